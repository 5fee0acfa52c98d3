"""Learned masks (BEAM, arXiv 2605.14438) on a frozen model: trained, kept in a file, applied."""
