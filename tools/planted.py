"""Small faults to plant, for tools/mutants.py: one plausible mistake each, and the test that has to notice.

(name, where, what stands there, what is put instead, the test): `where` is a glob from the root of the repository, what
stands there a regular expression that matches once among those files. A family of kernels that a GPU takes only when it is
forced is named in the test: "RAT_EXT_KERNELS=sm80 tests/...".
"""

from __future__ import annotations

from typing import NamedTuple


class Mutant(NamedTuple):
    name: str
    where: str
    old: str
    new: str
    tests: str

    @property
    def kind(self) -> str:
        if self.where.endswith(".py"):
            return "python"
        return "cuda" if self.where.startswith("csrc/cuda") or self.name.startswith("gpu") else "cpu"


ATTENTION, RECURRENCE = "tests/test_attention.py", "tests/test_recurrence.py"
LONG, MANY, DECODE, STATE = (
    "tests/test_long_chunks.py",
    "tests/test_many_chunks.py",
    "tests/test_decode.py",
    "tests/test_state.py",
)
PACKED, PINNED, ROUNDING = "tests/test_packed_sequences.py", "tests/test_pinned.py", "tests/test_rounding.py"
MANY_OPTIONS = "tests/test_many_chunks_options.py"
AUTOGRAD = "tests/test_autograd.py"

PYTHON = [
    Mutant(
        "scale by D",
        "rat_ext/*.py",
        r"return max\(shape\[-1\], 1\) \*\* -0\.5",
        "return max(shape[-1], 1) ** -1.0",
        "tests/test_laws.py::test_scale_moves_between_q_and_scale",
    ),
    Mutant(
        "scale of the packed entry",
        "rat_ext/ops.py",
        r"// max\(parts, 1\), 1\) \*\* -0\.5",
        "// max(parts, 1), 1) ** -0.25",
        "tests/test_packed_projection.py::test_equals_views",
    ),
    Mutant(
        "autocast leaves a state's out_gate",
        "rat_ext/ops.py",
        r"q, k_states, v_states, out_gate = _autocast\(\(q, k_states, v_states, out_gate\)\)",
        "q, k_states, v_states = _autocast((q, k_states, v_states))",
        f"{AUTOGRAD}::test_autocast_reaches_every_input",
    ),
    Mutant(
        "autocast casts float64",
        "rat_ext/ops.py",
        r"x\.is_floating_point\(\) and x\.dtype != torch\.float64",
        "x.is_floating_point()",
        f"{AUTOGRAD}::test_autocast_leaves_float64_alone",
    ),
    Mutant(
        "length bound of a continuation",
        "rat_ext/*.py",
        r"bound = state\.length_bound \+ tokens",
        "bound = state.length_bound",
        f"{STATE}::test_pieces_equal_the_whole",
    ),
    Mutant(
        "decode does not count",
        "rat_ext/*.py",
        r"(?:self|cache)\.length_bound \+= 1",
        "pass",
        f"{DECODE}::test_forward_continues_from_decode",
    ),
    Mutant(
        "tables with their strides",
        "rat_ext/ops.py",
        r"return x\.contiguous\(\)",
        "return x",
        "tests/test_alignment.py::test_strides_of_small_tensors",
    ),
    Mutant(
        "rows of packed sequences",
        "rat_ext/ops.py",
        r"rows \+= max\(cu_seqlens\.numel\(\) - 1, 0\)",
        "rows += 0",
        f"{PACKED}::test_against_float64",
    ),
    Mutant(
        "a gradient that does not come is one",
        "rat_ext/*.py",
        r"dy = torch\.zeros_like\(saved\[-1\]\)",
        "dy = torch.ones_like(saved[-1])",
        f"{RECURRENCE}::test_only_the_final_state",
    ),
    Mutant(
        "capacity",
        "rat_ext/cache.py",
        r"return \(self\.chunk_k\.shape\[2\] \+ 1\) \* self\.chunk_size - 1",
        "return self.chunk_k.shape[2] * self.chunk_size",
        f"{DECODE}::test_capacity_is_exact",
    ),
    Mutant(
        "reserve one row short",
        "rat_ext/cache.py",
        r"rows = max_length // self\.chunk_size\n",
        "rows = max_length // self.chunk_size - 1\n",
        f"{DECODE}::test_reserve",
    ),
    Mutant(
        "state dtype of float16",
        "rat_ext/cache.py",
        r"return torch\.float64 if dtype == torch\.float64 else torch\.float32",
        "return torch.float64 if dtype == torch.float64 else dtype",
        f"{STATE}::test_head_size",
    ),
]

PYTHON += [
    Mutant(
        "write lowers the bound",
        "rat_ext/cache.py",
        r"self\.length_bound = max\(self\.length_bound, other\.length_bound\)",
        "self.length_bound = other.length_bound",
        "tests/test_cache.py",
    ),
    Mutant("clone shares memory", "rat_ext/cache.py", r"self\._map\(torch\.clone\)", "self._map(lambda x: x)", f"{DECODE}"),
    Mutant("detach keeps the graph", "rat_ext/cache.py", r"self\._map\(torch\.detach\)", "self._map(lambda x: x)", f"{STATE}"),
]

# The operators' own side, compiled for the CPU.
OPS = [
    Mutant(
        "garbage for a bias without tokens",
        "csrc/ops/*.cpp",
        r"\} else if \(out\.dgate_bias\) \{\s*torch::stable::zero_\(\*out\.dgate_bias\);",
        "} else if (false) {",
        f"{ATTENTION}::test_nothing",
    ),
    Mutant(
        "garbage for a bias without tokens, recurrence",
        "csrc/ops/*.cpp",
        r"\} else if \(dgate_bias\) \{\s*torch::stable::zero_\(\*dgate_bias\);",
        "} else if (false) {",
        f"{RECURRENCE}::test_no_tokens_have_a_bias_without_gradient",
    ),
    Mutant(
        "strided states are misread",
        "csrc/ops/*",
        r"if \(!x\.is_contiguous\(\)\)",
        "if (false)",
        f"{STATE}::test_a_state_that_is_not_contiguous_is_refused",
    ),
    Mutant(
        "dy with a strided last dimension",
        "csrc/ops/*.cpp",
        r"g\.dy\.numel\(\) > 0 && g\.dy\.stride\(3\) != 1",
        "false",
        f"{AUTOGRAD}::test_strides_of_dy",
    ),
    Mutant(
        "expanded gradients of states",
        "csrc/ops/*.cpp",
        r"keep\[i\] = torch::stable::contiguous\(\*x\);",
        "keep[i] = *x;",
        f"{AUTOGRAD}::test_an_expanded_gradient_of_a_state",
    ),
    Mutant(
        "expanded gradient of a final state",
        "csrc/ops/*.cpp",
        r"dfinal_rows = torch::stable::contiguous\(\*dfinal\);",
        "dfinal_rows = *dfinal;",
        f"{AUTOGRAD}::test_an_expanded_gradient_of_a_state",
    ),
    Mutant("the scale is forgotten", "csrc/ops/*.cpp", r"p\.scale = o\.scale;", "p.scale = 1.0;", f"{ATTENTION}::test_scale"),
    Mutant("decode forgets the scale", "csrc/ops/*.cpp", r"p\.scale = scale;", "p.scale = 1.0;", f"{DECODE}::test_scale"),
    Mutant(
        "one group serves all",
        "csrc/ops/*.cpp",
        r"s\.k_groups = gate \? s\.q_groups : s\.heads;",
        "s.k_groups = s.q_groups;",
        "tests/test_chunk_attention.py::test_chunk_size",
    ),
]

CPU = [
    Mutant(
        "1 - f by cancellation",
        "csrc/cpu/*",
        r"const Vec<A> small = e \* large;",
        "const Vec<A> small = A(1) - large;",
        f"{ATTENTION}::test_extreme_gates",
    ),
    Mutant(
        "bfloat16 truncated",
        "csrc/cpu/*",
        r"\(w \+ 0x7fff \+ \(\(w >> 16\) & 1\)\) >> 16",
        "w >> 16",
        f"{ROUNDING}::test_to_nearest",
    ),
    Mutant(
        "bfloat16 ties up",
        "csrc/cpu/*",
        r"w \+ 0x7fff \+ \(\(w >> 16\) & 1\)",
        "w + 0x8000",
        "tests/test_cpu.py::test_ties_go_to_even[baseline]",
    ),
    Mutant(
        "float16 ties up",
        "csrc/cpu/*",
        r"0xfff \+ \(magnitude >> 13 & 1\)",
        "0x1000",
        "tests/test_cpu.py::test_ties_go_to_even[baseline]",
    ),
    Mutant("float16 truncated", "csrc/cpu/*", r"\+ 0xfff \+ \(magnitude >> 13 & 1\)", "", f"{ROUNDING}::test_to_nearest"),
    Mutant(
        "subnormal float16",
        "csrc/cpu/*",
        r"magnitude < 0x38800000",
        "magnitude < 0x38000000",
        f"{ROUNDING}::test_a_half_of_a_small_float16_is_exact",
    ),
    Mutant(
        "float16 overflows late",
        "csrc/cpu/*",
        r"magnitude >= 0x477ff000",
        "magnitude >= 0x47800000",
        f"{ROUNDING}::test_every_value_passes",
    ),
    Mutant(
        "rotation's sign",
        "csrc/cpu/*",
        r"y1 = x1 \* c - x2 \* s",
        "y1 = x1 * c + x2 * s",
        f"{ATTENTION}::test_optional_arguments",
    ),
    Mutant(
        "rotation by the tile's chunk",
        "csrc/cpu/*",
        r"rotate_row\(rotary, \(t\.position \+ i\) / chunk_size",
        "rotate_row(rotary, t.position / chunk_size",
        f"{ATTENTION}::test_chunk_size",
    ),
    Mutant(
        "carry past a chunk's end",
        "csrc/cpu/*",
        r"if \(i == 0 \|\| t\.position % plan\.reset == 0\)",
        "if (i == 0)",
        f"{LONG}::test_recurrence",
    ),
    Mutant(
        "gradient past a chunk's end",
        "csrc/cpu/*",
        r"if \(\(t\.position \+ t\.rows\) % plan\.reset == 0\) zero\(state, ld\);",
        "",
        f"{LONG}::test_recurrence",
    ),
    Mutant(
        "closing key of a long chunk",
        "csrc/cpu/*",
        r"rotate_row<A>\(p\.rotary, end / L - 1, D, 1, state\)",
        "rotate_row<A>(p.rotary, end / L, D, 1, state)",
        f"{LONG}::test_attention",
    ),
    Mutant(
        "gate's gradient at a chunk's start",
        "csrc/cpu/*",
        r"fresh \? Vec<A>\{\} : load\(previous \+ d\)",
        "load(previous + d)",
        f"{RECURRENCE}::test_chunk_size",
    ),
    Mutant("mask by one", "csrc/cpu/*", r"index < extra \?", "index <= extra ?", f"{ATTENTION}::test_chunk_size"),
    Mutant(
        "mask by one, backward",
        "csrc/cpu/*",
        r"first \+ j - visible\.all\)\) < extra \?",
        "first + j - visible.all)) <= extra ?",
        f"{ATTENTION}::test_chunk_size",
    ),
    Mutant(
        "sum not rescaled",
        "csrc/cpu/*",
        r"load\(l \+ q\) \* decay \+ sum",
        "load(l + q) + sum",
        f"{ATTENTION}::test_chunk_size",
    ),
    Mutant(
        "values not rescaled after one block",
        "csrc/cpu/*",
        r"if \(rescale && first > 0\)",
        "if (rescale && first > kKeys)",
        f"{ATTENTION}::test_many_chunks",
    ),
    Mutant(
        "0 times infinity",
        "csrc/cpu/*",
        r"e == 0 \? Vec<A>\{\} : ds",
        "ds",
        "tests/test_cpu.py::test_an_infinite_value_that_weighs_nothing",
    ),
    Mutant(
        "a part of dK too little",
        "csrc/cpu/*",
        r"int64_t part = 1; part < parts",
        "int64_t part = 2; part < parts",
        f"{ATTENTION}::test_many_chunks",
    ),
    Mutant(
        "keys turned on instead of back",
        "csrc/cpu/*",
        r"rotate_row<A>\(p\.rotary, c, D, -1,",
        "rotate_row<A>(p.rotary, c, D, 1,",
        f"{ATTENTION}::test_optional_arguments",
    ),
    Mutant(
        "gradient of running_v",
        "csrc/cpu/*",
        r"static_cast<const A\*>\(b\.drunning_v\)\[row \+ d\]",
        "static_cast<const A*>(b.drunning_k)[row + d]",
        f"{STATE}::test_ragged_lengths",
    ),
    Mutant(
        "decode restarts late",
        "csrc/cpu/*",
        r"if \(position % p\.chunk_size != 0\)",
        "if (position % p.chunk_size != 1)",
        f"{DECODE}::test_equals_the_forward",
    ),
    Mutant(
        "decode turns by the next chunk",
        "csrc/cpu/*",
        r"rotate_row<A>\(p\.rotary, position / p\.chunk_size, D, 1, q\)",
        "rotate_row<A>(p.rotary, (position + 1) / p.chunk_size, D, 1, q)",
        f"{DECODE}::test_equals_the_forward",
    ),
    Mutant(
        "decode drops the last keys",
        "csrc/cpu/*",
        r"\(keys \+ splits - 1\) / splits",
        "keys / splits",
        f"{DECODE}::test_number_of_chunks",
    ),
    Mutant("decode's sum not rescaled", "csrc/cpu/*", r"l \*= decay;", "", f"{DECODE}::test_number_of_chunks"),
    Mutant(
        "decode's splits not weighed",
        "csrc/cpu/*",
        r"total \+= weight \* l\[i\]",
        "total += l[i]",
        f"{DECODE}::test_number_of_chunks",
    ),
    Mutant("a skipped row is not zeroed", "csrc/cpu/*", r"zero\(y, p\.head_dim\);", "(void)y;", f"{DECODE}::test_slots"),
    Mutant(
        "lengths past 2^31",
        "csrc/cpu/*",
        r"size\.lengths && total > std::numeric_limits<int32_t>::max\(\)",
        "size.lengths && total > std::numeric_limits<int64_t>::max() - 1",
        f"{STATE}::test_no_more_than_2_31_tokens_in_all",
    ),
    Mutant(
        "decode past 2^31",
        "csrc/cpu/*",
        r" \|\| length == std::numeric_limits<int32_t>::max\(\)",
        "",
        f"{STATE}::test_no_more_than_2_31_tokens_in_all",
    ),
    Mutant(
        "initial state of the first row",
        "csrc/cpu/*",
        r"\(t\.sequence \* size\.heads \+ head\) \* size\.head_dim",
        "(t.batch * size.heads + head) * size.head_dim",
        f"{PACKED}::test_with_states",
    ),
    Mutant(
        "bias without the last tile",
        "csrc/cpu/*",
        r"int64_t i = 0; i < count; \+\+i\) \{\s*sum \+=",
        "int64_t i = 0; i < count - 1; ++i) { sum +=",
        f"{ATTENTION}::test_chunk_size",
    ),
    Mutant(
        "slope of the gate",
        "csrc/cpu/*",
        r"load\(grad \+ i\) \* load\(s\.f \+ i\) \* load\(s\.g \+ i\)",
        "load(grad + i) * load(s.f + i)",
        f"{RECURRENCE}::test_chunk_size",
    ),
    Mutant(
        "initial values from keys",
        "csrc/cpu/*",
        r"static_cast<const T\*>\(p\.initial\.v\) \+ from, bytes",
        "static_cast<const T*>(p.initial.k) + from, bytes",
        f"{STATE}::test_ragged_lengths",
    ),
    Mutant(
        "dead rows of a gradient",
        "csrc/cpu/*",
        r"zero\(to \+ before \* D, \(p\.initial\.rows - before\) \* D\);",
        "",
        f"{STATE}::test_ragged_lengths",
    ),
    Mutant(
        "slope of the output gate",
        "csrc/cpu/*",
        r"dy \* load\(s\.row0 \+ i\) \* gate\.minus",
        "dy * load(s.row0 + i) * gate.plus",
        f"{ATTENTION}::test_optional_arguments",
    ),
    Mutant(
        "final state of an empty sequence",
        "csrc/cpu/*",
        r"pass_empty<A>\(plan, z, b\.dfinal, b\.dinitial\);",
        "",
        f"{RECURRENCE}::test_packed",
    ),
    Mutant(
        "a long segment's product",
        "csrc/cpu/*",
        r"for \(int64_t i = 1; i < rows; \+\+i\) product",
        "for (int64_t i = 1; i < rows - 1; ++i) product",
        f"{LONG}::test_recurrence",
    ),
    Mutant(
        "odd columns of a product",
        "csrc/cpu/*",
        r"if \(n < columns\) multiply_panel",
        "if (n + 1 < columns - kPad) multiply_panel",
        f"{ATTENTION}::test_tokens",
    ),
]

SM80 = "RAT_EXT_KERNELS=sm80"

CUDA = [
    # The scans.
    Mutant(
        "chunk_attention keeps a state",
        "csrc/cuda/recurrence/forward.cu",
        r"if \(clock\.opens\(\) \|\| !gated\)",
        "if (clock.opens())",
        "tests/test_chunk_attention.py::test_chunk_size",
    ),
    Mutant(
        "own score without scale",
        "csrc/cuda/recurrence/forward.cu",
        r"= in\.scale \* own\[u\];",
        "= own[u];",
        f"{ATTENTION}::test_chunk_size",
    ),
    Mutant(
        "key of the next chunk",
        "csrc/cuda/recurrence/forward.cu",
        r"rotate<W>\(in\.rotary, clock\.chunk, s\.head_dim, lane, 1\.0f, turned\)",
        "rotate<W>(in.rotary, max(clock.chunk - 1, int64_t{0}), s.head_dim, lane, 1.0f, turned)",
        f"{ATTENTION}::test_optional_arguments",
    ),
    Mutant(
        "carry through a chunk's start", "csrc/cuda/recurrence/forward.cu", r"zero\(product\);", "", f"{LONG}::test_recurrence"
    ),
    Mutant(
        "carry joined the wrong way",
        "csrc/cuda/recurrence/forward.cu",
        r"fmaf\(product\[u\], state, end\[u\]\)",
        "fmaf(product[u], end[u], state)",
        f"{LONG}::test_recurrence",
    ),
    Mutant(
        "1 - f by cancellation, 16 bits",
        "csrc/cuda/**/*.cuh",
        r"g = e \* f;",
        "g = 1.0f - f;",
        f"{ATTENTION}::test_extreme_gates",
    ),
    Mutant(
        "1 - f by cancellation, float32",
        "csrc/cuda/**/*.cuh",
        r"const float low = e \* high;",
        "const float low = 1.0f - high;",
        f"{ATTENTION}::test_extreme_gates",
    ),
    Mutant(
        "bfloat16 rows truncated",
        "csrc/cuda/**/*.cuh",
        r"= __floats2bfloat162_rn\(x\[2 \* i\], x\[2 \* i \+ 1\]\);",
        "= __halves2bfloat162(__float2bfloat16_rz(x[2 * i]), __float2bfloat16_rz(x[2 * i + 1]));",
        f"{ROUNDING}::test_to_nearest",
    ),
    Mutant(
        "rotation across a lane",
        "csrc/cuda/**/*.cuh",
        r"\(straddles \? crossed : straight\)",
        "straight",
        f"{ATTENTION}::test_head_size",
    ),
    Mutant(
        "initial v from k",
        "csrc/cuda/**/*.cuh",
        r"load_floats\(in\.initial_v \+ at, v\)",
        "load_floats(in.initial_k + at, v)",
        f"{STATE}::test_ragged_lengths",
    ),
    Mutant(
        "every tile is the last",
        "csrc/cuda/**/*.cuh",
        r"t\.last = high == stop;",
        "t.last = true;",
        f"{STATE}::test_ragged_lengths",
    ),
    Mutant(
        "group sum of half a group",
        "csrc/cuda/**/*.cuh",
        r"int step = W / 2; step > 0; step /= 2\) x \+=",
        "int step = W / 2; step > 1; step /= 2) x +=",
        f"{ATTENTION}::test_chunk_size",
    ),
    Mutant(
        "alone for a chunk too long",
        "csrc/cuda/recurrence/backward.cu",
        r"tile\.position \+ i < s\.chunk_size",
        "tile.position + i <= s.chunk_size",
        f"{ATTENTION}::test_chunk_size",
    ),
    Mutant(
        "reverse carry through a chunk's start",
        "csrc/cuda/recurrence/backward.cu",
        r"v_carry\[j\] = opens \? 0\.0f : f\[j\] \* v_carry\[j\]",
        "v_carry[j] = f[j] * v_carry[j]",
        f"{LONG}::test_attention",
    ),
    Mutant(
        "chunk gradient of the last chunk",
        "csrc/cuda/recurrence/backward.cu",
        r"rotate<W>\(p\.in\.rotary, chunk, s\.head_dim, lane, -1\.0f, x\)",
        "rotate<W>(p.in.rotary, chunk, s.head_dim, lane, 1.0f, x)",
        f"{ATTENTION}::test_optional_arguments",
    ),
    Mutant(
        "gradient of running v is that of k",
        "csrc/cuda/recurrence/backward.cu",
        r"load_floats\(p\.drunning_v \+ at, v_carry\)",
        "load_floats(p.drunning_k + at, v_carry)",
        f"{STATE}::test_ragged_lengths",
    ),
    # Short chunks.
    Mutant(
        "short: carry through a chunk's start",
        "csrc/cuda/recurrence/reverse_short.cu",
        r"if \(!kWhole && \(edges >> t & 1\)\) k_carry",
        "if (false) k_carry",
        f"{ATTENTION}::test_chunk_size",
    ),
    Mutant(
        "short: alone too long",
        "csrc/cuda/recurrence/reverse_short.cu",
        r"lane % 16 < s\.chunk_size \? kAlone",
        "lane % 16 <= s.chunk_size ? kAlone",
        f"{ATTENTION}::test_chunk_size",
    ),
    Mutant(
        "short: chunks of a tile",
        "csrc/cuda/recurrence/reverse_short.cu",
        r"first_chunk \+ before, d\)",
        "first_chunk, d)",
        f"{ATTENTION}::test_chunk_size",
    ),
    Mutant(
        "short: gradient of the initial v",
        "csrc/cuda/recurrence/reverse_short.cu",
        r"p\.dinitial_v\[at \+ j\] = v_carry\[j\]",
        "p.dinitial_v[at + j] = k_carry[j]",
        f"{STATE}::test_ragged_lengths",
    ),
    Mutant(
        "short: bias of the last tile alone",
        "csrc/cuda/recurrence/reverse_short.cu",
        r"first_tile \? make_float2\(0\.0f, 0\.0f\) : \*at",
        "make_float2(0.0f, 0.0f)",
        "tests/test_laws.py::test_the_gradient_of_the_bias_is_a_sum",
    ),
    Mutant(
        "short: v of the gate's slope",
        "csrc/cuda/recurrence/reverse_short.cu",
        r"fmaf\(dv\[j\], v_past\[j\] - v\[j\],",
        "fmaf(dv[j], v_past[j],",
        f"{ATTENTION}::test_chunk_size",
    ),
    # The portable family and float32.
    Mutant(
        "sm80: mask by one",
        "csrc/cuda/attention/sm80_fwd.cu",
        r"n \* 8 >= visible\)",
        "n * 8 > visible)",
        f"{SM80} {MANY}::test_chunk_states",
    ),
    Mutant(
        "sm80: lse without its sum",
        "csrc/cuda/attention/sm80_fwd.cu",
        r"\(maximum\[m\]\[r\] \+ log2f\(total\)\) \* kLn2",
        "maximum[m][r] * kLn2",
        f"{SM80} {ATTENTION}::test_chunk_size",
    ),
    Mutant(
        "sm80: sum not rescaled",
        "csrc/cuda/attention/sm80_fwd.cu",
        r"sum\[m\]\[r\] \*= factor\[m\]\[r\];",
        "",
        f"{SM80} tests/test_laws.py::test_a_key_that_outweighs_the_others",
    ),
    Mutant(
        "sm80: sign of the scale",
        "csrc/cuda/attention/sm80_fwd.cu",
        r"k\.sign = p\.scale < 0 \? -1\.0f : 1\.0f;",
        "k.sign = 1.0f;",
        f"{SM80} {ATTENTION}::test_scale",
    ),
    Mutant(
        "sm80: mask by one, backward",
        "csrc/cuda/attention/sm80_bwd.cu",
        r"if \(n \* 8 < first\) weight",
        "if (n * 8 <= first) weight",
        f"{SM80} {MANY}::test_chunk_states",
    ),
    Mutant(
        "sm80: dK without scale",
        "csrc/cuda/attention/sm80_bwd.cu",
        r"a\[i\] \*= p\.scale;",
        "",
        f"{SM80} {ATTENTION}::test_chunk_size",
    ),
    Mutant(
        "f32: mask by one",
        "csrc/cuda/attention/f32.cu",
        r"< visible\[i\] \? expf",
        "<= visible[i] ? expf",
        f"{ATTENTION}::test_chunk_size",
    ),
    Mutant(
        "f32: lse without its sum",
        "csrc/cuda/attention/f32.cu",
        r"maximum\[i\] \+ logf\(total\)",
        "maximum[i]",
        f"{ATTENTION}::test_chunk_size",
    ),
    Mutant(
        "f32: rows past the end",
        "csrc/cuda/attention/f32.cu",
        r"&& row < rows && y \* R \+ i < keys",
        "&& y * R + i < keys",
        f"{PACKED}::test_against_float64",
    ),
    # Hopper.
    Mutant(
        "sm90: mask by one",
        "csrc/cuda/attention/sm90_fwd.cu",
        r"i / 4 \* 8 \+ i % 2 >= visible",
        "i / 4 * 8 + i % 2 > visible",
        f"{MANY}::test_chunk_states",
    ),
    Mutant(
        "sm90: own weight left out of the sum",
        "csrc/cuda/attention/sm90_fwd.cu",
        r"total \+= own_weight;",
        "",
        f"{MANY}::test_chunk_states",
    ),
    Mutant(
        "sm90: values not rescaled",
        "csrc/cuda/attention/sm90_fwd.cu",
        r"o\[i\] \*= shrink\[i / 2 % 2\];",
        "",
        "tests/test_laws.py::test_a_key_that_outweighs_the_others",
    ),
    Mutant(
        "sm90: rows of v past the last key",
        "csrc/cuda/attention/sm90_fwd.cu",
        r"if \(valid < C::kKeys\) \{",
        "if (false) {",
        f"{MANY_OPTIONS}::test_continued",
    ),
    Mutant(
        "sm90: angles of the chunk before",
        "csrc/cuda/attention/sm90_fwd.cu",
        r"left = size - past % size;",
        "left = size;",
        f"{MANY}::test_chunk_states",
    ),
    Mutant(
        "sm90: clear blocks",
        "csrc/cuda/attention/sm90_fwd.cu",
        r"const int clear = static_cast<int>\(tile\.first\) / C::kKeys;",
        "const int clear = static_cast<int>(tile.first) / C::kKeys + 1;",
        f"{MANY}::test_chunk_states",
    ),
    Mutant(
        "sm90: mask by one, backward",
        "csrc/cuda/attention/sm90_bwd.cu",
        r"i / 4 \* 8 \+ i % 2 < seen",
        "i / 4 * 8 + i % 2 <= seen",
        f"{MANY}::test_chunk_states",
    ),
    Mutant(
        "sm90: first sum of dQ added",
        "csrc/cuda/attention/sm90_bwd.cu",
        r"if \(a\.ordered && rank == 0\)",
        "if (a.ordered && rank == 1)",
        f"{MANY}::test_chunk_states",
    ),
    Mutant(
        "sm90: keys past the end",
        "csrc/cuda/attention/sm90_bwd.cu",
        r"if \(item\.keys < C::kKeys\) \{",
        "if (false) {",
        f"{MANY_OPTIONS}::test_continued",
    ),
    Mutant(
        "sm90: dK without scale",
        "csrc/cuda/attention/sm90_bwd.cu",
        r"dk\[4 \* i \+ 2 \* h\] \* a\.scale, ",
        "dk[4 * i + 2 * h], ",
        f"{MANY}::test_chunk_states",
    ),
    Mutant(
        "sm90: dQ turned on instead of back",
        "csrc/cuda/attention/sm90_bwd.cu",
        r"chunks\.of\(r\), half, piece, -1\.0f\)",
        "chunks.of(r), half, piece, 1.0f)",
        f"{MANY}::test_chunk_states",
    ),
    Mutant(
        "sm90: tiles of packed sequences",
        "csrc/cuda/attention/sm90_bwd.cu",
        r"/ C::kQueries \+ middle <= tile",
        "/ C::kQueries + middle < tile",
        f"{MANY_OPTIONS}::test_packed",
    ),
    # Decode, sequences, the grid of vector accesses.
    Mutant(
        "gpu decode: sum not rescaled",
        "csrc/cuda/rat_decode_step.cu",
        r"r\.sum \*= shrink;",
        "",
        f"{DECODE}::test_number_of_chunks",
    ),
    Mutant(
        "gpu decode: counters not reset",
        "csrc/cuda/rat_decode_step.cu",
        r"if \(threadIdx\.x == 0\) a\.arrived\[pair\] = 0;",
        "",
        f"{DECODE}::test_many_chunks",
    ),
    Mutant(
        "gpu decode: state of a new chunk",
        "csrc/cuda/rat_decode_step.cu",
        r"if \(offset > 0\) load_floats\(running_v, state\);",
        "load_floats(running_v, state);",
        f"{DECODE}::test_one_step",
    ),
    Mutant(
        "gpu decode: last slice",
        "csrc/cuda/rat_decode_step.cu",
        r"end = chunk \* \(slice \+ 1\) / a\.slices",
        "end = chunk / a.slices * (slice + 1)",
        f"{DECODE}::test_number_of_chunks",
    ),
    Mutant(
        "packed tiles by one",
        "csrc/cuda/device/sequence.cuh",
        r"s\.cu_seqlens\[middle\] / tile \+ 2 \* middle <= item",
        "s.cu_seqlens[middle] / tile + 2 * middle < item",
        f"{PACKED}::test_against_float64",
    ),
    Mutant(
        "gpu aligned by address alone",
        "csrc/ops/*",
        r" \|\| r\.batch % unit \|\| r\.token % unit \|\| r\.head % unit",
        "",
        "tests/test_alignment.py::test_one_tensor_off_the_grid",
    ),
    Mutant(
        "gpu aligned but for heads",
        "csrc/ops/*",
        r" \|\| r\.head % unit",
        "",
        "tests/test_alignment.py::test_one_tensor_off_the_grid",
    ),
    Mutant(
        "gpu alignment of dy forgotten",
        "csrc/ops/*.cpp",
        r"p\.out_gate, p\.y, b\.dy, b\.dq",
        "p.out_gate, p.y, b.dq",
        "tests/test_alignment.py::test_one_tensor_off_the_grid",
    ),
]

MUTANTS = [*PYTHON, *OPS, *CPU, *CUDA]
