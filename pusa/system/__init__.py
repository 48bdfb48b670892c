"""Files, locks, threads, processes, progress and text: what every part of Pusa needs from the machine."""
