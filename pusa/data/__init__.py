"""The tables that the stages hand to each other: Parquet shards and an index that makes them a whole."""
