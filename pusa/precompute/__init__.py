"""What precompute is made of: which rows are wanted, which there are, how they are made, how they become a table."""
