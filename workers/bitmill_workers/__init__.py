"""Job store, supervisor and runner of the quantization service."""
