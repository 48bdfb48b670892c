"""What a manifest needs of a device, before anything is loaded: dry runs on tensors that have shapes and no numbers."""
