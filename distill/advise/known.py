"""What compressions were measured to cost, each with its place and its model. Nothing here is of the model at hand.

A loss is the mean and one standard deviation more, so that a budget is not met by luck.
"""

from distill.advise.parts import Loss

LLAMA = "a Llama of 260k parameters, one scale a row, 80 steps of 8 × 192 tokens (docs/compression.md); larger models mostly lose less"
TERNARY = LLAMA.replace("80 steps", "1,200 steps").replace("a row", "a matrix")
MINILM = "a MiniLM-L6 of 22.7M parameters on Banking77, three seeds (docs/compression.md)"

# of rounding: by task and precision
ROUNDED: dict[tuple[str, str], Loss] = {
    ("classification", "onnx:int8"): Loss(0.19 + 0.14, "points", False, f"+0.19 ± 0.14; {MINILM}"),
    ("classification", "openvino:int8"): Loss(0.03 + 0.21, "points", False, f"+0.03 ± 0.21; {MINILM}"),
    ("causal-lm", "int4"): Loss(1.567 - 1.410, "nats", False, f"1.410 to 1.567 ± 0.000; {LLAMA}"),
}
# of training in few bits, with a teacher
TRAINED_IN: dict[tuple[str, str], Loss] = {
    ("causal-lm", "int4"): Loss(1.456 - 1.410, "nats", False, f"1.410 to 1.456 ± 0.000; {LLAMA}"),
    ("causal-lm", "int3"): Loss(1.650 + 0.004 - 1.410, "nats", False, f"1.410 to 1.650 ± 0.004; {LLAMA}"),
    ("causal-lm", "ternary"): Loss(1.733 + 0.005 - 1.410, "nats", False, f"1.410 to 1.733 ± 0.005; {TERNARY}"),
}
# share of what rounding loses that training wins back
WON_BACK = {"int4": 0.71, "int3": 0.78, "ternary": 0.94}
# bytes of packed weights by those of float32 or bfloat16 weights, with zstandard, on the same MiniLM
PACKED = {"fp32": 0.829, "bf16": 0.683}

# students of other sizes than the one at hand: to read, not to count with
STUDENTS = (
    "A Llama of 2.0M parameters taught a new one of 0.23M, 400 steps: 4.287 to 4.525 ± 0.010 nats, alone 4.821 (docs/demo.md)",
    "A table of logits taught a new ModernBERT of one layer Banking77: 92.7 to 90.7 ± 0.3 points, labels alone 89.9 (docs/experiments.md)",
    "DistilBERT (arXiv 1910.01108): 40 % fewer parameters, 97 % of BERT's score on GLUE, 60 % faster",
    "MiniLM (arXiv 2002.10957): half of the layers' parameters, more than 99 % of the teacher on SQuAD 2.0 and several tasks of GLUE",
    "Minitron (arXiv 2407.14679): 8B and 4B cut out of 15B with up to 40 × fewer training tokens than from scratch",
)
