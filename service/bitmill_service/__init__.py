"""HTTP service, command line and Python client of Bitmill. Never imports torch."""
