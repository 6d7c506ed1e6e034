"""Bytes to and from main memory, counted in a program's text."""

from icarus_jax.aot import hlo_text

# As libtpu writes it, shortened: a loop over 4 layers whose weights [4, 8, 128] lie in main memory, a vector in VMEM
# (S(1)), a kernel with a cost estimate, a prefetch, and a product with a weight that lies in main memory.
TEXT = """HloModule jit_f

%rename.0 (param_0.2: bf16[4,8,128]) -> bf16[4,8,128] {
  %param_0.2 = bf16[4,8,128]{2,1,0:T(8,128)(2,1)} parameter(0)
  ROOT %tiled = bf16[4,8,128]{2,1,0:T(16,128)(2,1)} copy(%param_0.2)
}

%fused_slice.1 (param_0: bf16[4,8,128], param_1: s32[]) -> bf16[1,8,128] {
  %param_0 = bf16[4,8,128]{2,1,0:T(8,128)(2,1)} parameter(0)
  %param_1 = s32[]{:T(128)} parameter(1)
  %zero = s32[]{:T(128)} constant(0)
  ROOT %slice = bf16[1,8,128]{2,1,0:T(8,128)(2,1)S(1)} dynamic-slice(%param_0, %param_1, %zero, %zero)
}

%outer.2 (param_0.1: bf16[4,8,128], param_1.1: s32[]) -> f32[8] {
  %param_0.1 = bf16[4,8,128]{2,1,0:T(8,128)(2,1)} parameter(0)
  %param_1.1 = s32[]{:T(128)} parameter(1)
  %renamed = bf16[4,8,128]{2,1,0:T(16,128)(2,1)} fusion(%param_0.1), kind=kLoop, calls=%rename.0
  %inner = bf16[1,8,128]{2,1,0:T(8,128)(2,1)S(1)} fusion(%renamed, %param_1.1), kind=kLoop, calls=%fused_slice.1
  ROOT %sum = f32[8]{0:T(128)S(1)} reduce(%inner), dimensions={0,2}, to_apply=%add
}

%body.3 (arg: (s32[], f32[8], bf16[4,8,128])) -> (s32[], f32[8], bf16[4,8,128]) {
  %arg = (s32[]{:T(128)}, f32[8]{0:T(128)S(1)}, bf16[4,8,128]{2,1,0:T(8,128)(2,1)}) parameter(0)
  %i = s32[]{:T(128)} get-tuple-element(%arg), index=0
  %x = f32[8]{0:T(128)S(1)} get-tuple-element(%arg), index=1
  %w = bf16[4,8,128]{2,1,0:T(8,128)(2,1)} get-tuple-element(%arg), index=2
  %y = f32[8]{0:T(128)S(1)} fusion(%w, %i), kind=kOutput, calls=%outer.2, backend_config={"flag":"S(0)"}
  %k = f32[8]{0:T(128)S(1)} custom-call(%y, %w), backend_config={"cost_estimate":{"flops":"7","bytes_accessed":"1000"}}
  ROOT %out = (s32[], f32[8]{0:T(128)S(1)}, bf16[4,8,128]{2,1,0:T(8,128)(2,1)}) tuple(%i, %k, %w)
}

%cond.4 (arg.1: (s32[], f32[8], bf16[4,8,128])) -> pred[] {
  %arg.1 = (s32[]{:T(128)}, f32[8]{0:T(128)S(1)}, bf16[4,8,128]{2,1,0:T(8,128)(2,1)}) parameter(0)
  ROOT %less = pred[]{:T(512)S(6)} constant(false)
}

ENTRY %main.5 (x.1: f32[8], w.1: bf16[4,8,128], v.1: f32[8,16]) -> f32[16] {
  %x.1 = f32[8]{0:T(128)} parameter(0)
  %w.1 = bf16[4,8,128]{2,1,0:T(8,128)(2,1)} parameter(1)
  %v.1 = f32[8,16]{1,0:T(8,128)} parameter(2)
  %x.2 = (f32[8]{0:T(128)S(1)}, f32[8]{0:T(128)}, u32[]{:S(2)}) copy-start(%x.1)
  %x.3 = f32[8]{0:T(128)S(1)} copy-done(%x.2)
  %start = (s32[]{:T(128)}, f32[8]{0:T(128)S(1)}, bf16[4,8,128]{2,1,0:T(8,128)(2,1)}) tuple(%zero.1, %x.3, %w.1)
  %loop = (s32[], f32[8]{0:T(128)S(1)}, bf16[4,8,128]{2,1,0:T(8,128)(2,1)}) while(%start), body=%body.3
  %z = f32[8]{0:T(128)S(1)} get-tuple-element(%loop), index=1
  ROOT %dot = f32[16]{0:T(128)} dot(%z, %v.1), lhs_contracting_dims={0}, rhs_contracting_dims={0}
}
"""


def test_what_lies_in_main_memory_is_counted_once():
    outside, inside = hlo_text.memory_traffic(TEXT)
    assert outside == 8 * 4 + 8 * 16 * 4 + 16 * 4  # the prefetched vector, v, the result
    # a layer's slice of the weights, although a fusion within a fusion takes it; the index; the kernel by its estimate,
    # but for its operand and its result in VMEM
    assert inside == 8 * 128 * 2 + 4 + 1000 - 2 * 8 * 4


def test_types():
    assert hlo_text.main_memory_bytes("(bf16[2,3]{1,0:T(8,128)(2,1)}, f32[4]{0:S(1)}, pred[5]{0}, u32[]{:S(2)})") == 17
    assert hlo_text.main_memory_bytes("f8e4m3fn[16]{0}") == 16
    assert hlo_text.main_memory_bytes("s4[16]{0}") == 8
