"""A host: is it fit to run here, and does it reach its peers?"""
