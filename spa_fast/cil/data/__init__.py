"""Class order, image folders, cached features and the stream of tasks."""
