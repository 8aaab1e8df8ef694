"""The candidate table: exact and approximate nearest neighbours, in units that ranks share."""
