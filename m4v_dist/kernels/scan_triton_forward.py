"""Device code of the scan's forward: states of chunks, states in front of chunks, outputs.

With s_t the sum of log decays dt A within a chunk, H its entering state and u = dt x, a chunk of the scan is

    y_q = exp(s_q) H C_q + sum over k <= q of exp(s_q - s_k) (C_q . B_k) u_k + D x_q
    H'  = exp(s_end) H + sum over k of exp(s_end - s_k) u_k (outer) B_k

in three launches: `chunk_states` makes the sum of each H', `pass_states` runs through the chunks of a segment, and
`chunk_outputs` makes y. s is summed in float64 and kept as two float32 numbers, so that a difference of two sums is
exact to float32 however strongly the tokens before them decayed. States are float32 and carried in float32; products
take operands in x's dtype and sum in float32.

Legend: `l` tokens, `h` heads, `p` head width, `g` groups, `n` state size, `c` chunks, `s` segments.
"""

import triton
import triton.language as tl


@triton.jit
def softplus(value):
    """log(1 + exp(value)) to float32's own precision, also where exp(value) is small against 1."""
    small = tl.exp(tl.minimum(value, 20.0))
    rounded = 1.0 + small
    # What rounding 1 + small lost is put back (log1p).
    exact = tl.where(rounded == 1.0, small, tl.log(rounded) * (small / tl.where(rounded == 1.0, 1.0, rounded - 1.0)))
    return tl.where(value > 20.0, value, exact)


@triton.jit
def step_sizes(dt, dt_bias, head, tokens, is_token, dt_stride, HAS_BIAS: tl.constexpr, SOFTPLUS: tl.constexpr):
    """Step sizes of some tokens and what softplus was taken of, float32; zero where there is no token."""
    raw = tl.load(dt + tokens * dt_stride + head, mask=is_token, other=0.0).to(tl.float32)
    if HAS_BIAS:
        raw += tl.load(dt_bias + head).to(tl.float32)
    steps = softplus(raw) if SOFTPLUS else raw
    return tl.where(is_token, steps, 0.0), raw


@triton.jit
def chunk_states(
    x, dt, A, dt_bias, B, chunks,  # read: l h p, l h, h, h, l g n, c 2
    steps, sums, sums_low, totals, states,  # written: h l, h l, h l, c h, c h p n; float32
    x_stride, dt_stride, B_stride, num_tokens, num_heads,
    HEADS_OF_GROUP: tl.constexpr, P: tl.constexpr, N: tl.constexpr,
    BLOCK_P: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
    HAS_BIAS: tl.constexpr, SOFTPLUS: tl.constexpr,
):  # fmt: skip
    """Step sizes, sums of log decays, and what one chunk adds to one head's state; a program for each of them."""
    chunk, head = tl.program_id(0).to(tl.int64), tl.program_id(1)
    start = tl.load(chunks + 2 * chunk).to(tl.int64)
    length = tl.load(chunks + 2 * chunk + 1)
    decay = tl.load(A + head).to(tl.float32)
    ps, ns = tl.arange(0, BLOCK_P), tl.arange(0, BLOCK_N)
    state = tl.zeros((BLOCK_P, BLOCK_N), tl.float32)
    running = tl.zeros((1,), tl.float64)
    for first in range(0, length, BLOCK_K):
        ks = first + tl.arange(0, BLOCK_K)
        is_token, tokens = ks < length, start + ks
        step, _ = step_sizes(dt, dt_bias, head, tokens, is_token, dt_stride, HAS_BIAS, SOFTPLUS)
        log_decay = (step * decay).to(tl.float64)
        block_sums = tl.cumsum(log_decay, 0)
        block_total = tl.sum(log_decay, 0)
        total_sums = running + block_sums
        high = total_sums.to(tl.float32)
        place = head.to(tl.int64) * num_tokens + tokens
        tl.store(steps + place, step, mask=is_token)
        tl.store(sums + place, high, mask=is_token)
        tl.store(sums_low + place, (total_sums - high.to(tl.float64)).to(tl.float32), mask=is_token)
        xs = tl.load(
            x + tokens[None, :] * x_stride + head * P + ps[:, None],
            mask=(ps < P)[:, None] & is_token[None, :],
            other=0.0,
        )  # p k
        Bs = tl.load(
            B + tokens[:, None] * B_stride + head // HEADS_OF_GROUP * N + ns[None, :],
            mask=is_token[:, None] & (ns < N)[None, :],
            other=0.0,
        )  # k n
        weights = step * tl.exp((block_total - block_sums).to(tl.float32))
        weighted = (xs.to(tl.float32) * weights[None, :]).to(Bs.dtype)
        state = state * tl.exp(block_total.to(tl.float32)) + tl.dot(weighted, Bs, input_precision="ieee")
        running += block_total
    tl.store(totals + chunk * num_heads + head + tl.arange(0, 1), running.to(tl.float32))
    place = ((chunk * num_heads + head) * P + ps[:, None]) * N + ns[None, :]
    tl.store(states + place, state, mask=(ps < P)[:, None] & (ns < N)[None, :])


@triton.jit
def pass_states(
    states, totals, first_chunks, initial, final,  # c h p n (read and written), c h, s + 1, s h p n, s h p n
    num_heads, SIZE: tl.constexpr, BLOCK: tl.constexpr, HAS_INITIAL: tl.constexpr,
):  # fmt: skip
    """Turn what each chunk adds into the state in front of it; a program for each tile of p n, head and segment."""
    tile, head, segment = tl.program_id(0), tl.program_id(1), tl.program_id(2).to(tl.int64)
    inside = tile * BLOCK + tl.arange(0, BLOCK)
    is_inside = inside < SIZE
    begin = tl.load(first_chunks + segment).to(tl.int64)
    end = tl.load(first_chunks + segment + 1).to(tl.int64)
    of_segment = (segment * num_heads + head) * SIZE + inside
    state = tl.zeros((BLOCK,), tl.float32)
    if HAS_INITIAL:
        state = tl.load(initial + of_segment, mask=is_inside, other=0.0).to(tl.float32)
    added = tl.load(states + (begin * num_heads + head) * SIZE + inside, mask=is_inside, other=0.0)
    for number in range(0, (end - begin).to(tl.int32)):
        chunk = begin + number
        place = (chunk * num_heads + head) * SIZE + inside
        # Asked for before it is needed: the chain would else wait for memory at each chunk.
        next_added = tl.load(
            states + place + num_heads * SIZE, mask=inside < tl.where(chunk + 1 < end, SIZE, 0), other=0.0
        )
        tl.store(states + place, state, mask=is_inside)
        state = state * tl.exp(tl.load(totals + chunk * num_heads + head)) + added
        added = next_added
    tl.store(final + of_segment, state, mask=is_inside)


@triton.jit
def chunk_outputs(
    x, B, C, D, steps, sums, sums_low, states, chunks,  # read: l h p, l g n, l g n, h, h l, h l, h l, c h p n, c 2
    y,  # written: l h p
    x_stride, B_stride, C_stride, num_tokens, num_heads, tiles,
    HEADS_OF_GROUP: tl.constexpr, P: tl.constexpr, N: tl.constexpr,
    BLOCK_P: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr, HAS_D: tl.constexpr,
):  # fmt: skip
    """Outputs of BLOCK_Q tokens of one head; a program for each such tile of a chunk, and head."""
    chunk, tile = (tl.program_id(0) // tiles).to(tl.int64), tl.program_id(0) % tiles
    head = tl.program_id(1)
    start = tl.load(chunks + 2 * chunk).to(tl.int64)
    length = tl.load(chunks + 2 * chunk + 1)
    if tile * BLOCK_Q < length:
        group = head // HEADS_OF_GROUP
        ps, ns, qs = tl.arange(0, BLOCK_P), tl.arange(0, BLOCK_N), tile * BLOCK_Q + tl.arange(0, BLOCK_Q)
        is_p, is_n, is_q = ps < P, ns < N, qs < length
        row = head.to(tl.int64) * num_tokens + start
        Cs = tl.load(
            C + (start + qs)[:, None] * C_stride + group * N + ns[None, :],
            mask=is_q[:, None] & is_n[None, :],
            other=0.0,
        )  # q n
        high = tl.load(sums + row + qs, mask=is_q, other=0.0)
        low = tl.load(sums_low + row + qs, mask=is_q, other=0.0)
        entering = tl.load(
            states + ((chunk * num_heads + head) * P + ps[None, :]) * N + ns[:, None],
            mask=is_n[:, None] & is_p[None, :],
            other=0.0,
        )  # n p
        out = tl.dot(Cs, entering.to(Cs.dtype), input_precision="ieee") * tl.exp(high + low)[:, None]
        for first in range(0, tl.minimum(length, (tile + 1) * BLOCK_Q), BLOCK_K):
            ks = first + tl.arange(0, BLOCK_K)
            is_k = ks < length
            Bs = tl.load(
                B + (start + ks)[None, :] * B_stride + group * N + ns[:, None],
                mask=is_n[:, None] & is_k[None, :],
                other=0.0,
            )  # n k
            xs = tl.load(
                x + (start + ks)[:, None] * x_stride + head * P + ps[None, :],
                mask=is_k[:, None] & is_p[None, :],
                other=0.0,
            )  # k p
            step = tl.load(steps + row + ks, mask=is_k, other=0.0)
            since = (high[:, None] - tl.load(sums + row + ks, mask=is_k, other=0.0)[None, :]) + (
                low[:, None] - tl.load(sums_low + row + ks, mask=is_k, other=0.0)[None, :]
            )
            is_earlier = (qs[:, None] >= ks[None, :]) & is_q[:, None]
            # Masked before exp: a later token's difference is positive and would overflow.
            decayed = tl.exp(tl.where(is_earlier, since, float("-inf"))) * step[None, :]
            scores = tl.dot(Cs, Bs, input_precision="ieee") * decayed
            out += tl.dot(tl.where(is_earlier, scores, 0.0).to(xs.dtype), xs, input_precision="ieee")
        place = (start + qs)[:, None] * num_heads * P + head * P + ps[None, :]
        if HAS_D:
            own = tl.load(
                x + (start + qs)[:, None] * x_stride + head * P + ps[None, :],
                mask=is_q[:, None] & is_p[None, :],
                other=0.0,
            )
            out += own.to(tl.float32) * tl.load(D + head).to(tl.float32)
        tl.store(y + place, out.to(y.dtype.element_ty), mask=is_q[:, None] & is_p[None, :])
