"""What one run of a compiled program costs a device, read from its text: matrix products, and traffic with its memory.

Loops count with their rounds (`program.executions`), unlike in `jax.stages.Compiled.cost_analysis`.
"""

import math
import re
from typing import NamedTuple

from moejax.analysis import program as program_lib


class Cost(NamedTuple):
    """Of one device, in one run.

    matmul_flops: 2 for each product and sum of a `dot` or `convolution`; all else is work for the vector units, which
    is not counted. kernel_flops: what Pallas kernels say that they do (`cost_estimate`), on whatever units.
    memory_bytes: see `traffic`.
    """

    matmul_flops: int
    kernel_flops: int
    memory_bytes: int


def count(program: program_lib.Program) -> Cost:
    """The cost of the program."""
    matmul = kernel = memory = 0
    for execution in program_lib.executions(program):
        opcode = execution.instruction.opcode
        if opcode in ("dot", "convolution"):
            matmul += execution.times * matmul_flops(execution)
        elif opcode == "custom-call":
            estimate = re.search(r'"cost_estimate":\{"flops":"?(\d+)', execution.instruction.rest)
            kernel += execution.times * int(estimate[1]) if estimate else 0
        if not execution.is_fused:
            memory += execution.times * traffic(program, execution)
    return Cost(matmul, kernel, memory)


def matmul_flops(execution: program_lib.Execution) -> int:
    """Of one `dot` or `convolution`, without the products with the zeros of padding and dilation."""
    instruction = execution.instruction
    left, right = execution.operands()
    result = instruction.buffers[0]
    if instruction.opcode == "dot":
        dims = [int(dim) for dim in instruction.attribute("lhs_contracting_dims").split(",") if dim]
        return 2 * math.prod(result.dims) * math.prod(left.dims[dim] for dim in dims)
    labels = re.search(r"dim_labels=(\w+)_(\w+)->(\w+)", instruction.rest)
    assert labels is not None, instruction.rest[:200]
    left_labels, right_labels, result_labels = labels.groups()
    flops = 2 * right.dims[right_labels.index("i")]
    for label, size in zip(result_labels, result.dims, strict=True):
        if not label.isdigit():
            flops *= size
    window = dict(re.findall(r"(\w+)=([\d_x\-]+)", instruction.attribute("window")))
    for label in filter(str.isdigit, result_labels):
        flops *= _overlaps(
            left.dims[left_labels.index(label)],
            right.dims[right_labels.index(label)],
            result.dims[result_labels.index(label)],
            {name: text.split("x")[int(label)] for name, text in window.items()},
        )
    return flops


def _overlaps(left: int, right: int, result: int, window: dict[str, str]) -> int:
    """Pairs of a place in the result and one in the window that meet an element, along one dim.

    TPU writes batched products as convolutions over a dilated batch dim, in which nearly all pairs meet a zero.
    """
    stride, base, dilation = (int(window.get(name, 1)) for name in ("stride", "lhs_dilate", "rhs_dilate"))
    low = int(window.get("pad", "0_0").split("_")[0])
    end = (left - 1) * base + 1
    return sum(
        0 <= place < end and place % base == 0
        for output in range(result)
        for place in (output * stride - low + tap * dilation for tap in range(right))
    )


# --- memory --------------------------------------------------------------------------------------------------------

# Nothing moves: names for what is there, loops and calls (their bodies count), waits for what has been started
_FREE = (
    "parameter", "constant", "tuple", "get-tuple-element", "bitcast", "while", "conditional", "call", "after-all",
    "partition-id", "replica-id", "optimization-barrier", "async-start", "async-update", "async-done", "add-dependency",
)  # fmt: skip
_FREE_CALLS = ("AllocateBuffer", "ConcatBitcast", "AsyncCollectiveStart", "AsyncCollectiveDone")
_SLICES = ("dynamic-slice", "gather", "slice")


def traffic(program: program_lib.Program, execution: program_lib.Execution) -> int:
    """Bytes that an instruction outside fusions reads from the device's main memory and writes to it.

    Every operand and result that the program does not keep on the chip is moved once, of an array that is only sliced
    the slices, and of one that is updated in place the update. Padding of layouts is not counted.
    """
    instruction = execution.instruction
    opcode = instruction.opcode
    target = re.search(r'custom_call_target="([^"]*)"', instruction.rest) if opcode == "custom-call" else None
    if opcode in _FREE or opcode.endswith("-done") or (target and target[1] in _FREE_CALLS):
        return 0
    operands, results = execution.operands(), list(instruction.buffers)
    match opcode:
        case "fusion":
            inner = program.computations[instruction.attribute("calls")]
            return _reads(inner, execution) + _writes(inner)
        case "dynamic-slice" | "gather" | "slice":
            return _held(results) * 2 + _held(operands[1:])
        case "dynamic-update-slice":
            return 2 * _held(operands[1:2])
        case "scatter":  # reads what it adds to
            return 3 * _held(operands[2:3]) + _held(operands[1:2])
        case _ if opcode.endswith("-start"):  # its results begin with its operands, or are followed by them
            results = results[:1] if opcode == "copy-start" else results[len(operands) : 2 * len(operands)]
    return _held(operands) + _held(results)


def _held(buffers: list[program_lib.Buffer] | tuple[program_lib.Buffer, ...]) -> int:
    """Bytes of those that lie in main memory."""
    return sum(buffer.num_bytes for buffer in buffers if buffer.space == 0)


def _reads(inner: program_lib.Computation, execution: program_lib.Execution) -> int:
    """Of the operands of a fusion. Inside, layouts say nothing of where an array lies: the operands' own do."""
    users: dict[str, list[program_lib.Instruction]] = {name: [] for name in inner.instructions}
    for instruction in inner.instructions.values():
        for name in instruction.operands:
            users[name].append(instruction)

    def of(name: str) -> int:
        """Of the value of this name, by what is done with it."""
        whole = sum(buffer.num_bytes for buffer in inner.instructions[name].buffers)
        part = 0
        for user in users[name]:
            if user.opcode == "bitcast":
                part += of(user.name)
            elif user.opcode in _SLICES and user.operands[0] == name:
                part += sum(buffer.num_bytes for buffer in user.buffers)
            elif user.opcode == "dynamic-update-slice" and user.operands[0] == name:
                part += 0  # in place
            else:
                return whole
        return min(whole, part)

    places = {place: name for name, place in inner.parameters.items()}
    known, total = execution.computation.instructions, 0
    for place, operand in enumerate(execution.instruction.operands):
        if _held(known[operand].buffers):
            total += of(places[place])
    return total


def _writes(inner: program_lib.Computation) -> int:
    """Of the results of a fusion."""
    roots = [inner.root]
    if inner.root.opcode == "tuple":
        roots = [inner.instructions[name] for name in inner.root.operands]
    total = 0
    for root in roots:
        made = root
        while made.opcode == "bitcast":
            made = inner.instructions[made.operands[0]]
        if made.opcode == "dynamic-update-slice":
            update = inner.instructions[made.operands[1]]
            total += sum(buffer.num_bytes for buffer in update.buffers)
        else:
            total += _held(root.buffers)
    return total
