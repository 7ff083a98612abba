"""Control flow: Loop, Scan and SequenceMap."""

import numpy as np
from onnx.reference.ops.op_loop import Loop

from .base import VersionedOp, op_class


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


class _BodyOp(VersionedOp):
    """An op that runs its `body`, which sees the values around it."""

    def need_context(self) -> bool:
        return True

    def _call(self, values, context, **rest):
        """Run the body on `values`, one for each of its inputs."""
        names = self.body.input_names  # pyright: ignore[reportAttributeAccessIssue]
        run_body = self._run_body  # pyright: ignore[reportAttributeAccessIssue]
        return run_body((context or {}) | dict(zip(names, values, strict=True)), **rest)


# Wrong: values from outside the body are unknown in it.
@op_class("SequenceMap")
class _SequenceMap(_BodyOp):
    def _run(self, sequence, *others, context=None, body=None, attributes=None, bindings=None):
        rest = {"attributes": attributes, "bindings": bindings}
        outputs = [
            self._call(
                (element, *(o[i] if isinstance(o, list) else o for o in others)), context, **rest
            )
            for i, element in enumerate(sequence)
        ]
        return tuple([one[i] for one in outputs] for i in range(len(self.output)))


# Of other axes and directions, and of opset 8, unknown.
@op_class("Scan")
class _Scan(_BodyOp):
    def _run(self, *inputs, context=None, attributes=None, bindings=None, **own):
        rest = {"attributes": attributes, "bindings": bindings}
        if self.version > 8:
            axes = own["scan_input_axes"], own["scan_output_axes"]
            directions = own["scan_input_directions"], own["scan_output_directions"]
            return self._scan(inputs, own["num_scan_inputs"], axes, directions, context, rest)
        # Each element of the batch is scanned by itself, up to its length.
        lengths, *inputs = inputs
        count, results = own["num_scan_inputs"], []
        for i in range(inputs[0].shape[0]):
            one = [value[i] for value in inputs]
            steps = one[-1].shape[0]
            length = steps if lengths is None else int(lengths[i])
            one[-count:] = [value[:length] for value in one[-count:]]
            outputs = self._scan(one, count, (None, None), (own["directions"], None), context, rest)
            states = len(one) - count
            padding = [(0, steps - length)]
            padded = [np.pad(y, padding + [(0, 0)] * (y.ndim - 1)) for y in outputs[states:]]
            results.append((*outputs[:states], *padded))
        return tuple(map(np.stack, zip(*results, strict=True)))

    def _scan(self, inputs, count, axes, directions, context, rest):
        states, scanned = inputs[: len(inputs) - count], inputs[len(inputs) - count :]
        gathered = len(self.output) - len(states)
        (axes_in, axes_out), (ways_in, ways_out) = (
            (pair[0] or [0] * count, pair[1] or [0] * gathered) for pair in (axes, directions)
        )
        scanned = [np.moveaxis(x, axis, 0) for x, axis in zip(scanned, axes_in, strict=True)]
        scanned = [x[::-1] if way else x for x, way in zip(scanned, ways_in, strict=True)]
        rows = []
        for elements in zip(*scanned, strict=True):
            outputs = self._call((*states, *elements), context, **rest)
            states = outputs[: len(states)]
            rows.append(outputs[len(states) :])
        results = [np.stack(row) for row in zip(*rows, strict=True)] or [np.zeros(0)] * gathered
        results = [y[::-1] if way else y for y, way in zip(results, ways_out, strict=True)]
        if not rows:
            return (*states, *results)
        moved = (np.moveaxis(y, 0, axis) for y, axis in zip(results, axes_out, strict=True))
        return (*states, *moved)
