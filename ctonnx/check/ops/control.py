"""Control flow: Loop."""

import numpy as np
from onnx.reference.ops.op_loop import Loop

from .base import op_class


# Wrong: it adds no axis to what is gathered, and takes a condition left out for a false one.
@op_class("Loop")
class _Loop(Loop):
    def _run(
        self,
        M,
        cond,
        *carried,
        context=None,
        body=None,
        attributes=None,
        bindings=None,
    ):
        cond = np.array(True) if cond is None else cond
        names = self.body.input_names  # pyright: ignore[reportAttributeAccessIssue]
        run_body = self._run_body  # pyright: ignore[reportAttributeAccessIssue]
        count, step, scanned = len(carried), 0, []
        while cond and (M is None or step < M):
            inputs = dict(zip(names, (np.int64(step), cond, *carried), strict=True))
            outputs = run_body((context or {}) | inputs, attributes=attributes, bindings=bindings)
            cond, carried = outputs[0], outputs[1 : 1 + count]
            scanned.append(outputs[1 + count :])
            step += 1
        if not scanned:
            return (*carried, *[np.zeros(0)] * (len(self.output) - count))
        return (*carried, *map(np.stack, zip(*scanned, strict=True)))
