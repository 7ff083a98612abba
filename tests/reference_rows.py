"""Ops that onnx has no node tests for, at ranks and opsets that matter: what test_reference_ops.py
runs in ONNX Runtime and in the reference run."""

import numpy as np


def steps(*shape, high=256, dtype=np.uint8):
    """Random whole numbers below `high`."""
    return np.random.default_rng(1).integers(0, high, shape).astype(dtype)


ONE, TENTH, ZERO, MANY = np.float32(0.05), np.float32(0.1), np.uint8(120), np.float32([0.1, 0.2])
QUANTIZED = (steps(2, 3, 4, 4), ONE, ZERO)
HEADS = (2, 3, 8)  # batch, length, hidden: two heads

# Op and attributes, and its inputs: arrays, or the shapes of random ones. None is left out.
MICROSOFT = [
    ("FusedConv", {"activation": "Relu", "pads": [1, 1, 1, 1]}, [(1, 2, 5, 5), (3, 2, 3, 3), (3,)]),
    (
        "FusedConv",
        {"activation": "LeakyRelu", "activation_params": [0.2], "strides": [2, 2]},
        [(1, 2, 5, 5), (3, 2, 3, 3), (3,)],
    ),
    ("FusedGemm", {"activation": "Relu", "transB": 1}, [(2, 3), (4, 3), (4,)]),
    ("FusedMatMul", {"transA": 1, "alpha": 0.5}, [(2, 4, 3), (2, 4, 5)]),
    ("FusedMatMul", {"transBatchA": 1, "transBatchB": 1}, [(3, 2, 4), (4, 2, 5)]),
    ("TransposeMatMul", {"transB": 1}, [(2, 3), (4, 3)]),
    ("Gelu", {}, [(2, 3)]),
    ("BiasGelu", {}, [(2, 3), (3,)]),
    ("FastGelu", {}, [(2, 3), (3,)]),
    ("QuickGelu", {}, [(2, 3)]),
    ("QuickGelu", {"alpha": 1.0}, [(2, 3)]),
    ("SkipLayerNormalization", {"epsilon": 1e-5}, [HEADS, HEADS, (8,), (8,), (8,)]),
    ("SkipSimplifiedLayerNormalization", {"epsilon": 1e-5}, [HEADS, HEADS, (8,), (8,)]),
    (
        "EmbedLayerNormalization",
        {},
        [
            steps(2, 3, high=9, dtype=np.int32),
            steps(2, 3, high=2, dtype=np.int32),
            *((9, 8), (5, 8), (2, 8), (8,), (8,)),
            np.int32([[1, 1, 0], [1, 1, 1]]),
        ],
    ),
    ("Attention", {"num_heads": 2}, [HEADS, (8, 24), (24,), np.int32([[1, 1, 0], [1, 1, 1]])]),
    ("Attention", {"num_heads": 2, "unidirectional": 1}, [HEADS, (8, 24), (24,)]),
    ("Attention", {"num_heads": 2}, [HEADS, (8, 24), (24,), np.int32([2, 3])]),
    ("Attention", {"num_heads": 2}, [HEADS, (8, 24), (24,), None, (2, 2, 2, 5, 4)]),
    ("MultiHeadAttention", {"num_heads": 2}, [HEADS, (2, 5, 8), (2, 5, 8), (24,)]),
    ("MultiHeadAttention", {"num_heads": 2, "unidirectional": 1}, [HEADS, HEADS, HEADS]),
    (
        "MultiHeadAttention",
        {"num_heads": 2, "scale": 0.3},
        [HEADS, (2, 5, 8), (2, 5, 8), None, np.int32([3, 5]), (1, 2, 3, 5)],
    ),
    ("RotaryEmbedding", {}, [HEADS, np.int64([0]), (6, 4), (6, 4)]),
    ("RotaryEmbedding", {"interleaved": 1}, [(2, 2, 3, 8), np.int64([2]), (6, 4), (6, 4)]),
    (
        "QAttention",
        {"num_heads": 2},
        [steps(*HEADS), steps(8, 24), (24,), TENTH, ONE, None, ZERO, ZERO],
    ),
    ("QLinearAdd", {}, [*QUANTIZED, steps(4, 4), TENTH, ZERO, TENTH, ZERO]),
    ("QLinearMul", {}, [*QUANTIZED, steps(4, 4), TENTH, ZERO, ONE, ZERO]),
    ("QLinearSigmoid", {}, [*QUANTIZED, np.float32(1 / 256), np.uint8(0)]),
    ("QLinearLeakyRelu", {"alpha": 0.2}, [*QUANTIZED, ONE, ZERO]),
    ("QLinearSoftmax", {"opset": 13, "axis": 1}, [*QUANTIZED, np.float32(1 / 256), np.uint8(0)]),
    ("QLinearSoftmax", {"opset": 11, "axis": 1}, [*QUANTIZED, np.float32(1 / 256), np.uint8(0)]),
    ("QLinearConcat", {"axis": 1}, [TENTH, ZERO, *QUANTIZED, steps(2, 1, 4, 4), TENTH, ZERO]),
    (
        "QLinearWhere",
        {},
        [steps(4, high=2).astype(bool), *QUANTIZED, steps(4, 4), TENTH, ZERO, TENTH, ZERO],
    ),
    ("QLinearGlobalAveragePool", {}, [*QUANTIZED, ONE, ZERO]),
    ("QLinearAveragePool", {"kernel_shape": [3, 3], "pads": [1, 1, 1, 1]}, [*QUANTIZED, ONE, ZERO]),
    (
        "QLinearConv",
        {"kernel_shape": [3, 3]},
        [*QUANTIZED, steps(2, 3, 3, 3), MANY, np.uint8([120, 120]), TENTH * 50, ZERO],
    ),
    (
        "QGemm",
        {"transB": 1},
        [steps(2, 3), ONE, ZERO, steps(4, 3), TENTH, ZERO, np.int32([1, 2, 3, 4])],
    ),
    ("QGemm", {}, [steps(2, 3), ONE, ZERO, steps(3, 4), TENTH, ZERO, None, TENTH, ZERO]),
    ("MatMulInteger16", {}, [steps(2, 3, dtype=np.int16), steps(3, 4, dtype=np.int16)]),
    ("MatMulIntegerToFloat", {}, [steps(2, 3), steps(3, 4), ONE, TENTH, ZERO, ZERO, (4,)]),
    ("DynamicQuantizeMatMul", {}, [(2, 3), steps(3, 4), TENTH, ZERO, (4,)]),
    (
        "DynamicQuantizeLSTM",
        {"hidden_size": 4, "direction": "bidirectional"},
        [
            *((5, 2, 3), steps(2, 3, 16), steps(2, 4, 16), (2, 32), None, None, None, None),
            *(MANY, np.uint8([120, 120]), MANY, np.uint8([120, 120])),
        ],
    ),
    (
        "MatMulNBits",
        {"K": 20, "N": 3, "block_size": 16, "bits": 4},
        [(2, 20), steps(3, 2, 8), (6,)],
    ),
    (
        "MatMulNBits",
        {"K": 32, "N": 3, "block_size": 16, "bits": 4},
        [(2, 32), steps(3, 2, 8), (6,), steps(3)],
    ),
    ("QuantizeLinear", {}, [(2, 3), ONE, ZERO]),
    ("DequantizeLinear", {}, [steps(2, 3), ONE, ZERO]),
    ("Inverse", {}, [(2, 3, 3)]),
    ("CDist", {"metric": "euclidean"}, [(4, 3), (5, 3)]),
    ("CDist", {"metric": "sqeuclidean"}, [(4, 3), (5, 3)]),
    ("Trilu", {"upper": 0}, [(3, 4), np.int64(1)]),
    ("ExpandDims", {}, [(3, 4), np.int32(-1)]),
    ("Range", {}, [np.float32(1), np.float32(4), np.float32(0.5)]),
    ("GatherND", {}, [(3, 4), np.int64([[0, 1], [2, 3]])]),
    ("Unique", {}, [np.float32([3, 1, 3, 2, 1])]),
    ("Pad", {"mode": "constant"}, [(3, 4), np.int64([1, 0, 0, 2]), np.float32([7])]),
    ("GridSample", {}, [(1, 2, 4, 5), (1, 3, 3, 2)]),
    ("NhwcMaxPool", {"kernel_shape": [2, 2]}, [steps(1, 4, 4, 3)]),
    ("ConvTransposeWithDynamicPads", {}, [(1, 2, 4, 4), (2, 3, 3, 3), np.int64([1, 0, 0, 1])]),
]

TREE = {
    "nodes_treeids": [0, 0, 0],
    "nodes_nodeids": [0, 1, 2],
    "nodes_featureids": [0, 0, 0],
    "nodes_modes": ["BRANCH_LEQ", "LEAF", "LEAF"],
    "nodes_values": [0.1, 0.0, 0.0],
    "nodes_truenodeids": [1, 0, 0],
    "nodes_falsenodeids": [2, 0, 0],
}

ML = [
    ("ArrayFeatureExtractor", {}, [(3, 4), np.int64([2, 0])]),
    ("Binarizer", {"threshold": 0.2}, [(3, 4)]),
    ("CategoryMapper", {"cats_int64s": [1, 2], "cats_strings": ["a", "b"]}, [np.int64([2, 5, 1])]),
    (
        "CategoryMapper",
        {"cats_int64s": [1, 2], "cats_strings": ["a", "b"]},
        [np.array(["b", "c"], object)],
    ),
    ("FeatureVectorizer", {"inputdimensions": [2, 3]}, [(4, 2), (4, 3)]),
    (
        "Imputer",
        {"imputed_value_floats": [1.0, 2.0], "replaced_value_float": 0.0},
        [np.float32([[0, 5], [3, 0]])],
    ),
    ("LabelEncoder", {"keys_int64s": [1, 2], "values_floats": [0.5, 1.5]}, [np.int64([2, 1])]),
    (
        "LinearClassifier",
        {
            "classlabels_ints": [0, 1, 2],
            "coefficients": np.linspace(-1, 1, 12).tolist(),
            "intercepts": [0.1, 0.2, 0.3],
            "multi_class": 1,
            "post_transform": "SOFTMAX",
        },
        [(3, 4)],
    ),
    ("LinearRegressor", {"coefficients": [0.1, -0.2, 0.3, 0.4], "intercepts": [0.5]}, [(3, 4)]),
    ("Normalizer", {"norm": "L2"}, [(3, 4)]),
    ("OneHotEncoder", {"cats_int64s": [1, 2, 3], "zeros": 1}, [np.int64([2, 5, 1])]),
    ("Scaler", {"offset": [0.5], "scale": [2.0]}, [(3, 4)]),
    *(
        (
            "SVMRegressor",
            {
                "kernel_type": kernel,
                "kernel_params": [0.5, 0.1, 2.0],
                "support_vectors": [0.1, 0.2, -0.3, 0.4],
                "coefficients": [1.5, -0.5],
                "n_supports": 2,
                "rho": [0.2],
            },
            [(5, 2)],
        )
        for kernel in ("LINEAR", "POLY", "RBF", "SIGMOID")
    ),
    (
        "SVMClassifier",
        {
            "kernel_type": "RBF",
            "kernel_params": [0.5, 0.1, 2.0],
            "support_vectors": [0.1, 0.2, -0.3, 0.4],
            "vectors_per_class": [1, 1],
            "coefficients": [1.5, -0.5],
            "classlabels_ints": [3, 4],
            "rho": [0.2],
        },
        [(5, 2)],
    ),
    (
        "TreeEnsembleRegressor",
        {
            **TREE,
            "target_ids": [0, 0],
            "target_nodeids": [1, 2],
            "target_treeids": [0, 0],
            "target_weights": [-1.5, 2.5],
            "n_targets": 1,
        },
        [(5, 2)],
    ),
    (
        "TreeEnsembleClassifier",
        {
            **TREE,
            "class_ids": [0, 1, 2],
            "class_nodeids": [1, 2, 2],
            "class_treeids": [0, 0, 0],
            "class_weights": [1.5, 2.5, 2.0],
            "classlabels_int64s": [3, 4, 5],
        },
        [(5, 2)],
    ),
    ("ZipMap", {"classlabels_int64s": [3, 4]}, [(3, 2)]),
    ("ZipMap", {"classlabels_strings": ["a", "b"]}, [(3, 2)]),
]

# Resize to sizes is what PyTorch's exporter writes.
SIZES, NONE = np.int64([1, 2, 9, 4]), np.float32([])
STANDARD = [
    ("GlobalMaxPool", {}, [(2, 3, 7)], 13),
    ("GlobalLpPool", {}, [(2, 3, 4)], 7, 21),
    ("GlobalLpPool", {"p": 3}, [(2, 3, 4, 2, 2)], 7, 21),
    ("LpPool", {"kernel_shape": [3, 2], "pads": [1, 0, 2, 1], "p": 3}, [(2, 2, 7, 6)], 7, 11, 18),
    (
        "MaxRoiPool",
        {"pooled_shape": [2, 3], "spatial_scale": 0.5},
        [(2, 3, 6, 7), np.float32([[0, 0, 2, 9, 9], [1, 3, 0, 8, 4]])],
        *(7, 21),
    ),
    *(
        (
            "RoiAlign",
            {"output_height": 2, "output_width": 3, "sampling_ratio": ratio, "mode": mode},
            [(2, 3, 6, 7), np.float32([[-3, 0, 5, 5], [1, 2, 9, 3]]), np.int64([1, 0])],
            *(11, 16),
        )
        for ratio in (0, 2)
        for mode in ("avg", "max")
    ),
    ("Pad", {"pads": [0, -1, 2, -1, 0, 1], "value": 3.0}, [(2, 3, 4)], 7, 10),
    *(
        ("Pad", {"mode": mode}, [(2, 3, 4), np.int64([0, 1, -1, -1, 0, 2])], 11, 13, 18, 21)
        for mode in ("constant", "reflect", "edge")
    ),
    *(
        (
            "Resize",
            {"mode": mode, "coordinate_transformation_mode": how},
            [(1, 2, 7, 6), NONE, scales, sizes],
            *(11, 13, 18, 21),
        )
        for mode in ("nearest", "linear", "cubic")
        for how in ("half_pixel", "asymmetric", "align_corners", "pytorch_half_pixel")
        for scales, sizes in (
            (NONE, SIZES),
            (np.float32([1, 1, 0.5, 2.3]), None),
            (np.float32([1, 1, 0.15, 0.7]), None),
        )
    ),
    ("Resize", {"mode": "linear"}, [(1, 2, 10, 3), NONE, np.float32([1, 1, 0.7, 1])], 11, 19),
    *(
        ("Resize", {"mode": "nearest", "nearest_mode": how}, [(1, 2, 7, 6), NONE, NONE, SIZES], 11)
        for how in ("floor", "ceil", "round_prefer_floor", "round_prefer_ceil")
    ),
    ("Hardmax", {"axis": 1}, [(2, 3, 4)], 7, 11, 13),
    ("Mean", {}, [(4,), (3, 4), (3, 1)], 8, 13),
    ("Unique", {"sorted": 0, "axis": 1}, [np.float32([[3, 1, 3], [2, 0, 2]])], 11),
    ("Unique", {"sorted": 0}, [np.float32([[3, 1, 3], [2, 0, 2]])], 11),
    ("DynamicQuantizeLinear", {}, [(3, 40)], 11),
    ("DynamicQuantizeLinear", {}, [np.zeros((2, 3), np.float32)], 11),
    ("Unsqueeze", {"axes": [3, 0]}, [(2, 3)], 7, 11),
    ("STFT", {}, [(2, 16), np.int64(4), (8,)], 17),
    ("SimplifiedLayerNormalization", {"epsilon": 1e-5}, [HEADS, (8,)], 17),
]

# Models of other ops; x is [3, 4].
TEXTS = {
    "Optional": """{ o = Optional (x)  b = OptionalHasElement (o)  z = OptionalGetElement (o)
        y = Where (b, z, z) }""",
    "sequences": """{ s = SplitToSequence <axis = 1> (x)  one = Constant <value_int = 1> ()
        a = SequenceAt (s, one)  t = SequenceErase (s, one)  u = SequenceConstruct (a, a)
        b = ConcatFromSequence <axis = 1> (t)  c = ConcatFromSequence <axis = 0, new_axis = 1> (u)
        n = SequenceLength (s)  m = Cast <to = 1> (n)
        d = ReduceSum (b)  e = ReduceSum (c)  y = Sum (x, d, e, m) }""",
    "SequenceMap that sees outer names": """{ s = SplitToSequence <axis = 0> (x)
        w = Abs (x)
        t = SequenceMap <body = body (float[a, b] v) => (float[c, d] z) {
            r = Relu (v)  z = Mul (r, w) }> (s)
        y = ConcatFromSequence <axis = 0> (t) }""",
    "SequenceMap of two": """{ s = SplitToSequence <axis = 0> (x)
        t = SequenceMap <body = body (float[a, b] v, float[c, d] w, float[3, 4] u)
            => (float[e, f] z) { p = Mul (v, w)  z = Add (p, u) }> (s, s, x)
        y = ConcatFromSequence <axis = 0> (t) }""",
    "Scan of columns from the last, that sees outer names": """{
        h = Constant <value_floats = [1.0, 2.0, 3.0]> ()  o = Abs (h)
        l, y = Scan <num_scan_inputs = 1, scan_input_axes = [1], scan_input_directions = [1],
            scan_output_axes = [1], scan_output_directions = [1],
            body = body (float[3] c, float[3] v) => (float[3] d, float[3] z) {
            d = Add (c, v)  z = Mul (d, o) }> (h, x) }""",
}


# The number of outputs to compare, where it is not 1.
OUTPUTS = {"EmbedLayerNormalization": 2, "Attention": 2, "MultiHeadAttention": 3, "Unique": 3}
OUTPUTS |= {
    "DynamicQuantizeLSTM": 3,
    "LinearClassifier": 2,
    "SVMClassifier": 2,
    "TreeEnsembleClassifier": 2,
}
OUTPUTS |= {"DynamicQuantizeLinear": 3}
