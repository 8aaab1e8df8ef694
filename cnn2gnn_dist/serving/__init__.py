"""A model behind HTTP: an app for uvicorn, its page, and the same app as a Ray Serve deployment.

Needs ``pip install "cnn2gnn-dist[serve]"``; ``ray_app`` also ``ray[serve]``.
"""
