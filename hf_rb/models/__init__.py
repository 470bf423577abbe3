"""Model classes, and methods that change a model's own modules."""
