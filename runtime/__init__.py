"""What every room stands on: processes, files, settings, seeds, errors. Knows nothing of networks or images."""
