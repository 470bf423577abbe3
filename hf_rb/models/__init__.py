"""Model classes, and methods that change a model's own modules."""

from hf_rb.utils.versions import check_versions


check_versions()
