"""Stage 4: jobs -> videos."""
