"""One file per schema version, oldest first; released files never change."""
