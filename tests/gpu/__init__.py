"""What only a GPU can show: ``make gpu``. Elsewhere every file here is skipped."""
