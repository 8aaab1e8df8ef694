"""Ranks, groups, collectives, Ray and supervised processes: who runs, and what ends with what."""
