"""Stage 1: videos and captions -> a table of verified clips, and one of rejects. Read stage.py first."""
