"""The selective scan as an ONNX function: softplus, one Scan node over the tokens, skip and gate. Imported where ONNX is asked for: it needs onnxscript.

Letters as in `homelib.network.scan.reference`; the arguments are those of the operator `homelib::selective_scan_cpu`.
"""

from onnxscript import FLOAT, graph, script
from onnxscript import opset18 as op
from onnxscript.values import Opset

DOMAIN = Opset("homelib", 1)


@script(DOMAIN, default_opset=op)
def selective_scan(
    u: FLOAT[...], delta: FLOAT[...], A: FLOAT[...], B: FLOAT[...], C: FLOAT[...], D: FLOAT[...], z: FLOAT[...], bias: FLOAT[...], softplus: bool, keep: bool
) -> tuple[FLOAT[...], FLOAT[...]]:
    """u, delta, z (B, D, L), A (D, N), B and C (B, N, L) -> y (B, D, L), and nothing that is kept for a backward pass."""

    @graph()
    def step(h: FLOAT[...], step_size: FLOAT[...], driven: FLOAT[...], B_t: FLOAT[...], C_t: FLOAT[...]) -> tuple[FLOAT[...], FLOAT[...]]:
        decay = op.Exp(op.Mul(op.Unsqueeze(step_size, [-1]), A))
        h_next = op.Add(op.Mul(decay, h), op.Mul(op.Unsqueeze(driven, [-1]), op.Unsqueeze(B_t, [1])))
        y_t = op.ReduceSum(op.Mul(h_next, op.Unsqueeze(C_t, [1])), [-1], keepdims=0)
        return h_next, y_t

    steps = op.Softplus(op.Add(delta, op.Unsqueeze(bias, [1])))
    start = op.ConstantOfShape(op.Concat(op.Shape(u, start=0, end=2), op.Shape(A, start=1), axis=0))
    state, y = op.Scan(start, steps, op.Mul(steps, u), B, C, body=step, num_scan_inputs=4, scan_input_axes=[2, 2, 2, 2], scan_output_axes=[2])
    skipped = op.Add(y, op.Mul(u, op.Unsqueeze(D, [1])))
    return op.Mul(skipped, op.Mul(z, op.Sigmoid(z))), op.Identity(state)
