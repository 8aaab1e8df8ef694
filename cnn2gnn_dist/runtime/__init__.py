"""Ranks, groups, collectives, Ray and supervised processes: what runs, and what ends with what."""
