"""What every room may use: errors, files, ports, processes, progress, result files."""
