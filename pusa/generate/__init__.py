"""Stage 4: jobs -> videos. Read stage.py first."""
