"""The filters that there are, for job scripts: `serialization.filters` has them, as they run on either side."""

from __future__ import annotations

from ..serialization.filters import ExcludeVars, Filter, FilterContext

__all__ = ["ExcludeVars", "Filter", "FilterContext"]
