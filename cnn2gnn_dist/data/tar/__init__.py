"""Tar archives by their headers, and the samples that their members make up."""
