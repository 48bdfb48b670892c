"""Read and write the tables that the stages exchange: Parquet shards, and an index that is written last."""
