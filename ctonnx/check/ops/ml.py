"""Ops of ai.onnx.ml that take or give maps, and CategoryMapper: the evaluator lacks most."""

import numpy as np
from onnx.reference.op_run import OpRun

from .base import op_class

_DOMAIN = "ai.onnx.ml"


@op_class("ZipMap", domain=_DOMAIN)
class _ZipMap(OpRun):
    def _run(self, x, *, classlabels_int64s, classlabels_strings):
        labels = classlabels_int64s or classlabels_strings
        return ([dict(zip(labels, row, strict=True)) for row in np.atleast_2d(x).tolist()],)


@op_class("CategoryMapper", domain=_DOMAIN)
class _CategoryMapper(OpRun):
    def _run(self, x, *, cats_int64s, cats_strings, default_int64, default_string):
        numbers = x.dtype == np.int64
        keys, values = (cats_int64s, cats_strings) if numbers else (cats_strings, cats_int64s)
        mapping = dict(zip(keys, values, strict=True))
        default = default_string if numbers else default_int64
        values = [mapping.get(key, default) for key in x.ravel().tolist()]
        return (np.array(values, object if numbers else np.int64).reshape(x.shape),)


@op_class("CastMap", domain=_DOMAIN)
class _CastMap(OpRun):
    def _run(self, x, *, cast_to, map_form, max_map):
        if map_form == "SPARSE":
            values = [x.get(key, 0) for key in range(max_map)]
        else:
            values = [x[key] for key in sorted(x)]
        dtype = {"TO_FLOAT": np.float64, "TO_INT64": np.int64, "TO_STRING": object}[cast_to]
        values = [str(value) for value in values] if dtype is object else values
        return (np.array([values], dtype),)


# Wrong: it gives no axis for the batch.
@op_class("DictVectorizer", domain=_DOMAIN)
class _DictVectorizer(OpRun):
    def _run(self, x, *, int64_vocabulary, string_vocabulary):
        values = [x.get(key, 0) for key in int64_vocabulary or string_vocabulary]
        return (np.array([values]),)
