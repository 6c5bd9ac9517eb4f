"""How often every instruction of a compiled program runs, and what it costs, as worked by hand."""

import jax
import jax.numpy as jnp
import pytest

from moejax.analysis import cost, program

# An outer loop 0, 2, 4 around an inner one that counts down from 7 to a bound that the outer one carries; both counters
# behind copies and fusions. A loop over data. A product in each.
LOOPS = """
HloModule loops

%less (p.0: s32[], p.1: s32[]) -> pred[] {
  %p.0 = s32[] parameter(0)
  %p.1 = s32[] parameter(1)
  ROOT %c = pred[] compare(%p.0, %p.1), direction=LT
}

%minus_one (p.2: s32[]) -> s32[] {
  %p.2 = s32[] parameter(0)
  %m = s32[] constant(-1)
  ROOT %a = s32[] add(%p.2, %m)
}

%inner_condition (state.0: (s32[], s32[], f32[2,3])) -> pred[] {
  %state.0 = (s32[], s32[], f32[2,3]{1,0}) parameter(0)
  %bound.0 = s32[] get-tuple-element(%state.0), index=1
  %i.0 = s32[] get-tuple-element(%state.0), index=0
  ROOT %test.0 = pred[] fusion(%bound.0, %i.0), kind=kLoop, calls=%less
}

%inner_body (state.1: (s32[], s32[], f32[2,3])) -> (s32[], s32[], f32[2,3]) {
  %state.1 = (s32[], s32[], f32[2,3]{1,0}) parameter(0)
  %i.1 = s32[] get-tuple-element(%state.1), index=0
  %next.1 = s32[] fusion(%i.1), kind=kLoop, calls=%minus_one
  %bound.1 = s32[] get-tuple-element(%state.1), index=1
  %x.1 = f32[2,3]{1,0} get-tuple-element(%state.1), index=2
  %dot.1 = f32[2,2]{1,0} dot(%x.1, %x.1), lhs_contracting_dims={1}, rhs_contracting_dims={1}
  ROOT %t.1 = (s32[], s32[], f32[2,3]{1,0}) tuple(%next.1, %bound.1, %x.1)
}

%outer_condition (state.2: (s32[], s32[], f32[2,3])) -> pred[] {
  %state.2 = (s32[], s32[], f32[2,3]{1,0}) parameter(0)
  %i.2 = s32[] get-tuple-element(%state.2), index=0
  %five = s32[] constant(5)
  ROOT %test.2 = pred[] compare(%i.2, %five), direction=LT
}

%outer_body (state.3: (s32[], s32[], f32[2,3])) -> (s32[], s32[], f32[2,3]) {
  %state.3 = (s32[], s32[], f32[2,3]{1,0}) parameter(0)
  %i.3 = s32[] get-tuple-element(%state.3), index=0
  %two = s32[] constant(2)
  %next.3 = s32[] add(%two, %i.3)
  %bound.3 = s32[] get-tuple-element(%state.3), index=1
  %x.3 = f32[2,3]{1,0} get-tuple-element(%state.3), index=2
  %dot.3 = f32[2,2]{1,0} dot(%x.3, %x.3), lhs_contracting_dims={1}, rhs_contracting_dims={1}
  %seven = s32[] constant(7)
  %start = s32[] copy(%seven)
  %init.3 = (s32[], s32[], /*index=2*/f32[2,3]{1,0}) tuple(%start, %bound.3, %x.3)
  %inner = (s32[], s32[], f32[2,3]{1,0}) while(%init.3), condition=%inner_condition, body=%inner_body
  ROOT %t.3 = (s32[], s32[], f32[2,3]{1,0}) tuple(%next.3, %bound.3, %x.3)
}

%data_condition (state.4: (s32[], s32[])) -> pred[] {
  %state.4 = (s32[], s32[]) parameter(0)
  %i.4 = s32[] get-tuple-element(%state.4), index=0
  %end.4 = s32[] get-tuple-element(%state.4), index=1
  ROOT %test.4 = pred[] compare(%i.4, %end.4), direction=LT
}

%data_body (state.5: (s32[], s32[])) -> (s32[], s32[]) {
  %state.5 = (s32[], s32[]) parameter(0)
  %i.5 = s32[] get-tuple-element(%state.5), index=0
  %one.5 = s32[] constant(1)
  %next.5 = s32[] add(%i.5, %one.5)
  %end.5 = s32[] get-tuple-element(%state.5), index=1
  ROOT %t.5 = (s32[], s32[]) tuple(%next.5, %end.5)
}

ENTRY %main (x: f32[2,3], n: s32[]) -> f32[2,3] {
  %x = f32[2,3]{1,0} parameter(0)
  %n = s32[] parameter(1)
  %zero = s32[] constant(0)
  %three = s32[] constant(3)
  %dot.0 = f32[2,2]{1,0} dot(%x, %x), lhs_contracting_dims={1}, rhs_contracting_dims={1}
  %init = (s32[], s32[], f32[2,3]{1,0}) tuple(%zero, %three, %x)
  %outer = (s32[], s32[], f32[2,3]{1,0}) while(%init), condition=%outer_condition, body=%outer_body
  %init.6 = (s32[], s32[]) tuple(%zero, %n)
  %data = (s32[], s32[]) while(%init.6), condition=%data_condition, body=%data_body, metadata={op_name="jit(f)/while"}
  %noted = (s32[], s32[]) while(%init.6), condition=%data_condition, body=%data_body, \
backend_config={"known_trip_count":{"n":"9"}}
  ROOT %y = f32[2,3]{1,0} get-tuple-element(%outer), index=2
}
"""


def test_a_product_inside_loops_counts_with_the_rounds_of_all_of_them():
    parsed = program.parse(LOOPS)
    times = {e.instruction.name: e.times for e in program.executions(parsed) if e.instruction.opcode == "dot"}
    assert times == {"dot.0": 1, "dot.3": 3, "dot.1": 3 * 4}
    rounds = [e.times for e in program.executions(parsed) if e.instruction.name == "next.5"]
    assert rounds == [1, 9]  # from data: once, and it is said where; noted by XLA
    assert program.unknown_loops(parsed) == ["jit(f)/while"]
    assert cost.count(parsed).matmul_flops == (1 + 3 + 12) * 2 * (2 * 2 * 3)


def test_flops_of_scans_are_those_of_the_closed_form_while_xla_counts_each_body_once():
    def inner(x_BD, w_DD):
        return jnp.tanh(x_BD @ w_DD), None

    def outer(x_BD, w_KDD):
        return jax.lax.scan(inner, x_BD, w_KDD)[0], None

    def loss(w_LKDD, x_BD):
        return jnp.sum(jax.lax.scan(outer, x_BD, w_LKDD)[0])

    B, D, K, L = 8, 16, 5, 3
    arrays = [jax.ShapeDtypeStruct(shape, jnp.float32) for shape in ((L, K, D, D), (B, D))]
    compiled = jax.jit(jax.grad(loss)).lower(*arrays).compile()
    one = 2 * B * D * D
    assert cost.count(program.parse(compiled.as_text())).matmul_flops == 3 * L * K * one
    assert compiled.cost_analysis()["flops"] < 8 * one


def test_without_loops_bytes_and_flops_are_those_that_xla_counts():
    def loss(w_KDD, x_BD):
        for w_DD in w_KDD:
            x_BD = jnp.tanh(x_BD @ w_DD)
        return jnp.sum(x_BD**2)

    def step(w_KDD, x_BD):
        return w_KDD - 0.1 * jax.grad(loss)(w_KDD, x_BD)

    arrays = [jax.ShapeDtypeStruct(shape, jnp.float32) for shape in ((3, 256, 256), (512, 256))]
    compiled = jax.jit(step).lower(*arrays).compile()
    counted, analysis = cost.count(program.parse(compiled.as_text())), compiled.cost_analysis()
    assert counted.memory_bytes == analysis["bytes accessed"]
    assert counted.matmul_flops == pytest.approx(analysis["flops"], rel=0.01)  # XLA counts elementwise work, too


INSTRUCTIONS = """
%sliced (p.0: f32[10,8,4], p.1: s32[], p.2: f32[8,4], p.3: f32[10,8,4]) -> (f32[8,4], f32[10,8,4]) {
  %p.0 = f32[10,8,4]{2,1,0} parameter(0)
  %p.1 = s32[] parameter(1)
  %p.2 = f32[8,4]{1,0} parameter(2)
  %p.3 = f32[10,8,4]{2,1,0} parameter(3)
  %zero = s32[] constant(0)
  %slice = f32[1,8,4]{2,1,0} dynamic-slice(%p.0, %p.1, %zero, %zero), dynamic_slice_sizes={1,8,4}
  %row = f32[8,4]{1,0} bitcast(%slice)
  %sum = f32[8,4]{1,0} add(%row, %p.2)
  %back = f32[1,8,4]{2,1,0} bitcast(%sum)
  %update = f32[10,8,4]{2,1,0} dynamic-update-slice(%p.3, %back, %p.1, %zero, %zero)
  ROOT %both = (f32[8,4]{1,0}, f32[10,8,4]{2,1,0}) tuple(%sum, %update)
}

ENTRY %main (a: f32[10,8,4], i: s32[], b: f32[8,4], e: bf16[21,5,6], w: bf16[21,6,7]) -> f32[8,4] {
  %a = f32[10,8,4]{2,1,0} parameter(0)
  %i = s32[] parameter(1)
  %b = f32[8,4]{1,0:T(8,128)S(1)} parameter(2)
  %e = bf16[21,5,6]{2,1,0} parameter(3)
  %w = bf16[21,6,7]{2,1,0} parameter(4)
  INSTRUCTION
  ROOT %end = f32[8,4]{1,0} copy(%b)
}
"""


def only(line):
    parsed = program.parse(INSTRUCTIONS.replace("INSTRUCTION", line))
    return parsed, next(e for e in program.executions(parsed) if e.instruction.name == "x")


@pytest.mark.parametrize(
    ("line", "flops"),
    [
        ("%x = bf16[5,7]{1,0} dot(%e, %w), lhs_contracting_dims={0,2}, rhs_contracting_dims={0,1}", 2 * 5 * 7 * 21 * 6),
        # TPU's batched product: of 21 x 21 pairs of places along the batch dim 21 meet
        ("%x = bf16[21,5,7]{2,1,0} convolution(%e, %w), window={size=21 stride=20 lhs_dilate=21}, "
         "dim_labels=0bf_0io->0bf", 2 * 21 * 5 * 6 * 7),
        ("%x = bf16[21,5,7]{2,1,0} convolution(%e, %w), window={size=21 stride=21 pad=20_20 lhs_dilate=20 "
         "rhs_reversal=1}, dim_labels=0bf_0io->0bf", 2 * 21 * 5 * 6 * 7),
        # a sum over a spatial dim; a window that slides over all of it, and past both ends
        ("%x = bf16[1,5,7]{2,1,0} convolution(%e, %w), window={size=21}, dim_labels=0bf_0io->0bf", 2 * 5 * 7 * 6 * 21),
        ("%x = bf16[41,5,7]{2,1,0} convolution(%e, %w), window={size=21 pad=20_20}, dim_labels=0bf_0io->0bf",
         2 * 5 * 7 * 6 * 21 * 21),
    ],
)  # fmt: skip
def test_flops_of_a_product_as_worked_by_hand(line, flops):
    _, execution = only(line)
    assert cost.matmul_flops(execution) == flops


@pytest.mark.parametrize(
    ("line", "moved"),
    [
        ("%x = f32[10,8,4]{2,1,0} copy(%a)", 2 * 4 * 320),
        ("%x = f32[8,4]{1,0:T(8,128)S(1)} copy(%b)", 0),  # on the chip
        ("%x = (f32[10,8,4]{2,1,0:S(1)}, f32[10,8,4]{2,1,0}, u32[]) copy-start(%a)", 4 * 320),  # into the chip
        ("%x = f32[1,8,4]{2,1,0} dynamic-slice(%a, %i, %i, %i), dynamic_slice_sizes={1,8,4}", 2 * 4 * 32 + 3 * 4),
        ("%x = f32[8,10,4]{2,1,0} bitcast(%a)", 0),
        # of two stacks a slice each, read and written; b is on the chip, the sum is written
        ("%x = (f32[8,4]{1,0}, f32[10,8,4]{2,1,0}) fusion(%a, %i, %b, %a), kind=kLoop, calls=%sliced",
         4 * 32 + 4 + 4 * 32 + 4 * 32),
    ],
)  # fmt: skip
def test_bytes_of_an_instruction_are_those_that_leave_or_enter_main_memory(line, moved):
    parsed, execution = only(line)
    assert cost.traffic(parsed, execution) == moved


def test_what_is_no_program_is_refused():
    with pytest.raises(ValueError, match="has no ENTRY"):
        program.parse("module @jit_f { func.func public @main() }")
