"""TRL's trainers with the methods as flags. A config module imports without its trainer; this package imports
neither.
"""

from hf_rb.utils.versions import check_versions


check_versions()
