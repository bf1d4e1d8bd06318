"""Device code of the scan's backward, in five launches; the notation is that of `scan_triton_forward`.

With G the gradient of a chunk's leaving state and N_qk = exp(s_q - s_k) step_k (dy_q . x_k) (C_q . B_k):

    gradient of u_k = exp(s_end - s_k) G B_k + sum over q >= k of exp(s_q - s_k) (C_q . B_k) dy_q
    gradient of C_q = exp(s_q) H^T dy_q + sum over k <= q of exp(s_q - s_k) step_k (dy_q . x_k) B_k, B_k's likewise
    gradient of the log decay of token t = what passes over t: pairs N_qk with k < t <= q, from the entering state to
        q >= t, from k < t to the leaving state, and from the entering to the leaving state.

`chunk_adjoints` and `pass_adjoints` make G, `query_gradients` and `key_gradients` what belongs to the tokens, and
`decay_gradients` sums up over t within each chunk, so that no sum runs over more than a chunk. Row and column sums of N
are taken in float32 from the same products, because they nearly cancel. Nothing is added by atomics: where several
programs give to one number, each writes its own part and the caller adds them up in a fixed order.

Legend: `l` tokens, `h` heads, `p` head width, `g` groups, `n` state size, `c` chunks, `s` segments, `a` parts of
a group.
"""

import triton
import triton.language as tl

from m4v_dist.kernels.scan_triton_forward import step_sizes


@triton.jit
def chunk_adjoints(
    dy, C, sums, sums_low, chunks,  # read: l h p, l g n, h l, h l, c 2
    adjoints,  # written: c h p n
    C_stride, num_tokens, num_heads,
    HEADS_OF_GROUP: tl.constexpr, P: tl.constexpr, N: tl.constexpr,
    BLOCK_P: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """What the outputs of one chunk give to its entering state; a program for each chunk and head."""
    chunk, head = tl.program_id(0).to(tl.int64), tl.program_id(1)
    start = tl.load(chunks + 2 * chunk).to(tl.int64)
    length = tl.load(chunks + 2 * chunk + 1)
    ps, ns = tl.arange(0, BLOCK_P), tl.arange(0, BLOCK_N)
    is_p, is_n = ps < P, ns < N
    row = head.to(tl.int64) * num_tokens + start
    adjoint = tl.zeros((BLOCK_P, BLOCK_N), tl.float32)
    for first in range(0, length, BLOCK_K):
        qs = first + tl.arange(0, BLOCK_K)
        is_q = qs < length
        s = tl.load(sums + row + qs, mask=is_q, other=0.0) + tl.load(sums_low + row + qs, mask=is_q, other=0.0)
        dys = tl.load(
            dy + ((start + qs)[None, :] * num_heads + head) * P + ps[:, None],
            mask=is_p[:, None] & is_q[None, :],
            other=0.0,
        )  # p q
        Cs = tl.load(
            C + (start + qs)[:, None] * C_stride + head // HEADS_OF_GROUP * N + ns[None, :],
            mask=is_q[:, None] & is_n[None, :],
            other=0.0,
        )  # q n
        decayed = (dys.to(tl.float32) * tl.exp(s)[None, :]).to(Cs.dtype)
        adjoint += tl.dot(decayed, Cs, input_precision="ieee")
    place = ((chunk * num_heads + head) * P + ps[:, None]) * N + ns[None, :]
    tl.store(adjoints + place, adjoint, mask=is_p[:, None] & is_n[None, :])


@triton.jit
def pass_adjoints(
    adjoints, states, totals, first_chunks, dfinal,  # c h p n (read and written), c h p n, c h, s + 1, s h p n
    dinitial, across,  # written: s h p n, tiles c h
    num_chunks, num_heads, SIZE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Turn what each chunk gives to its entering state into the gradient of its leaving state, last chunk first.

    Also the part of each chunk's decay gradient that passes over the whole of it, one number for each tile.
    """
    tile, head, segment = tl.program_id(0), tl.program_id(1), tl.program_id(2).to(tl.int64)
    inside = tile * BLOCK + tl.arange(0, BLOCK)
    is_inside = inside < SIZE
    begin = tl.load(first_chunks + segment).to(tl.int64)
    end = tl.load(first_chunks + segment + 1).to(tl.int64)
    of_segment = (segment * num_heads + head) * SIZE + inside
    leaving = tl.load(dfinal + of_segment, mask=is_inside, other=0.0).to(tl.float32)
    given = tl.load(adjoints + ((end - 1) * num_heads + head) * SIZE + inside, mask=is_inside, other=0.0)
    for back in range(0, (end - begin).to(tl.int32)):
        chunk = end - 1 - back
        place = (chunk * num_heads + head) * SIZE + inside
        next_given = tl.load(
            adjoints + place - num_heads * SIZE, mask=inside < tl.where(chunk > begin, SIZE, 0), other=0.0
        )
        entering = tl.load(states + place, mask=is_inside, other=0.0)
        tl.store(adjoints + place, leaving, mask=is_inside)
        decay = tl.exp(tl.load(totals + chunk * num_heads + head))
        both = tl.sum(entering * leaving, 0) * decay
        tl.store(across + (tile * num_chunks + chunk) * num_heads + head, both)
        leaving = leaving * decay + given
        given = next_given
    tl.store(dinitial + of_segment, leaving, mask=is_inside)


@triton.jit
def query_gradients(
    x, B, C, dy, steps, sums, sums_low, states, chunks,  # read: l h p, l g n, l g n, l h p, h l x3, c h p n, c 2
    dC, query_sums,  # written: a l g n; h l, what reaches each query from earlier tokens and the entering state
    x_stride, B_stride, C_stride, num_tokens, num_heads, num_groups, tiles, parts,
    HEADS_OF_GROUP: tl.constexpr, HEADS: tl.constexpr, P: tl.constexpr, N: tl.constexpr,
    BLOCK_P: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """Gradient of C for a tile of queries, summed over HEADS heads; a program for each tile, group and part of it."""
    chunk, tile = (tl.program_id(0) // tiles).to(tl.int64), tl.program_id(0) % tiles
    group, part = tl.program_id(1) // parts, tl.program_id(1) % parts
    start = tl.load(chunks + 2 * chunk).to(tl.int64)
    length = tl.load(chunks + 2 * chunk + 1)
    if tile * BLOCK_Q < length:
        ps, ns, qs = tl.arange(0, BLOCK_P), tl.arange(0, BLOCK_N), tile * BLOCK_Q + tl.arange(0, BLOCK_Q)
        is_p, is_n, is_q = ps < P, ns < N, qs < length
        Cs = tl.load(
            C + (start + qs)[:, None] * C_stride + group * N + ns[None, :],
            mask=is_q[:, None] & is_n[None, :],
            other=0.0,
        )  # q n
        total = tl.zeros((BLOCK_Q, BLOCK_N), tl.float32)
        for number in range(0, HEADS):
            head = group * HEADS_OF_GROUP + part * HEADS + number
            row = head.to(tl.int64) * num_tokens + start
            dys = tl.load(
                dy + ((start + qs)[:, None] * num_heads + head) * P + ps[None, :],
                mask=is_q[:, None] & is_p[None, :],
                other=0.0,
            )  # q p
            high = tl.load(sums + row + qs, mask=is_q, other=0.0)
            low = tl.load(sums_low + row + qs, mask=is_q, other=0.0)
            entering = tl.load(
                states + ((chunk * num_heads + head) * P + ps[:, None]) * N + ns[None, :],
                mask=is_p[:, None] & is_n[None, :],
                other=0.0,
            )  # p n
            of_state = tl.dot(dys, entering.to(dys.dtype), input_precision="ieee") * tl.exp(high + low)[:, None]
            total += of_state
            query_sum = tl.sum(of_state * Cs.to(tl.float32), 1)
            for first in range(0, tl.minimum(length, (tile + 1) * BLOCK_Q), BLOCK_K):
                ks = first + tl.arange(0, BLOCK_K)
                is_k = ks < length
                Bs = tl.load(
                    B + (start + ks)[:, None] * B_stride + group * N + ns[None, :],
                    mask=is_k[:, None] & is_n[None, :],
                    other=0.0,
                )  # k n
                xs = tl.load(
                    x + (start + ks)[None, :] * x_stride + head * P + ps[:, None],
                    mask=is_p[:, None] & is_k[None, :],
                    other=0.0,
                )  # p k
                step = tl.load(steps + row + ks, mask=is_k, other=0.0)
                since = (high[:, None] - tl.load(sums + row + ks, mask=is_k, other=0.0)[None, :]) + (
                    low[:, None] - tl.load(sums_low + row + ks, mask=is_k, other=0.0)[None, :]
                )
                is_earlier = (qs[:, None] >= ks[None, :]) & is_q[:, None]
                decayed = tl.exp(tl.where(is_earlier, since, float("-inf"))) * step[None, :]
                pairs = tl.where(is_earlier, tl.dot(dys, xs, input_precision="ieee") * decayed, 0.0)  # q k
                scores = tl.dot(Cs, tl.trans(Bs), input_precision="ieee")
                query_sum += tl.sum(tl.where(qs[:, None] > ks[None, :], pairs * scores, 0.0), 1)
                total += tl.dot(pairs.to(Bs.dtype), Bs, input_precision="ieee")
            tl.store(query_sums + row + qs, query_sum, mask=is_q)
        place = ((part.to(tl.int64) * num_tokens + start + qs)[:, None] * num_groups + group) * N + ns[None, :]
        tl.store(dC + place, total.to(dC.dtype.element_ty), mask=is_q[:, None] & is_n[None, :])


@triton.jit
def key_gradients(
    x, B, C, D, dy, steps, sums, sums_low, adjoints, chunks,  # read: l h p, l g n x2, h, l h p, h l x3, c h p n, c 2
    dx, dB, key_sums, leaving_sums, step_sums, skip_sums,  # written: l h p, a l g n, h l x3, c tiles h
    x_stride, B_stride, C_stride, num_tokens, num_heads, num_groups, tiles, parts,
    HEADS_OF_GROUP: tl.constexpr, HEADS: tl.constexpr, P: tl.constexpr, N: tl.constexpr,
    BLOCK_P: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr, HAS_D: tl.constexpr,
):  # fmt: skip
    """Gradients of x and B for a tile of keys, B's summed over HEADS heads; a program as in `query_gradients`.

    Besides, per token: what it gives to later tokens, what to the leaving state, and the gradient of its step size
    where that multiplies x. Per tile: the gradient of D.
    """
    chunk, tile = (tl.program_id(0) // tiles).to(tl.int64), tl.program_id(0) % tiles
    group, part = tl.program_id(1) // parts, tl.program_id(1) % parts
    start = tl.load(chunks + 2 * chunk).to(tl.int64)
    length = tl.load(chunks + 2 * chunk + 1)
    ps, ns, ks = tl.arange(0, BLOCK_P), tl.arange(0, BLOCK_N), tile * BLOCK_K + tl.arange(0, BLOCK_K)
    is_p, is_n, is_k = ps < P, ns < N, ks < length
    Bs = tl.load(
        B + (start + ks)[:, None] * B_stride + group * N + ns[None, :], mask=is_k[:, None] & is_n[None, :], other=0.0
    )  # k n
    total = tl.zeros((BLOCK_K, BLOCK_N), tl.float32)
    for number in range(0, HEADS):
        head = group * HEADS_OF_GROUP + part * HEADS + number
        row = head.to(tl.int64) * num_tokens + start
        xs = tl.load(
            x + (start + ks)[:, None] * x_stride + head * P + ps[None, :], mask=is_k[:, None] & is_p[None, :], other=0.0
        )  # k p
        step = tl.load(steps + row + ks, mask=is_k, other=0.0)
        high = tl.load(sums + row + ks, mask=is_k, other=0.0)
        low = tl.load(sums_low + row + ks, mask=is_k, other=0.0)
        leaving = tl.load(
            adjoints + ((chunk * num_heads + head) * P + ps[:, None]) * N + ns[None, :],
            mask=is_p[:, None] & is_n[None, :],
            other=0.0,
        ).to(xs.dtype)  # p n
        to_end = (tl.load(sums + row + length - 1) - high) + (tl.load(sums_low + row + length - 1) - low)
        until_end = tl.where(is_k, tl.exp(tl.where(is_k, to_end, float("-inf"))), 0.0)
        du = tl.dot(Bs, tl.trans(leaving), input_precision="ieee") * until_end[:, None]  # k p
        wide = xs.to(tl.float32)
        tl.store(leaving_sums + row + ks, tl.sum(wide * du, 1) * step, mask=is_k)
        total += tl.dot((wide * (step * until_end)[:, None]).to(leaving.dtype), leaving, input_precision="ieee")
        key_sum = tl.zeros((BLOCK_K,), tl.float32)
        for first in range(tile * BLOCK_K, length, BLOCK_Q):
            qs = first + tl.arange(0, BLOCK_Q)
            is_q = qs < length
            Cs = tl.load(
                C + (start + qs)[:, None] * C_stride + group * N + ns[None, :],
                mask=is_q[:, None] & is_n[None, :],
                other=0.0,
            )  # q n
            dys = tl.load(
                dy + ((start + qs)[:, None] * num_heads + head) * P + ps[None, :],
                mask=is_q[:, None] & is_p[None, :],
                other=0.0,
            )  # q p
            since = (tl.load(sums + row + qs, mask=is_q, other=0.0)[None, :] - high[:, None]) + (
                tl.load(sums_low + row + qs, mask=is_q, other=0.0)[None, :] - low[:, None]
            )
            is_later = (qs[None, :] >= ks[:, None]) & is_q[None, :]
            decayed = tl.exp(tl.where(is_later, since, float("-inf")))  # k q
            scores = tl.dot(Bs, tl.trans(Cs), input_precision="ieee")
            given = tl.where(is_later, scores * decayed, 0.0)
            du += tl.dot(given.to(dys.dtype), dys, input_precision="ieee")
            products = tl.dot(xs, tl.trans(dys), input_precision="ieee")
            pairs = tl.where(is_later, products * (decayed * step[:, None]), 0.0)
            key_sum += tl.sum(tl.where(qs[None, :] > ks[:, None], pairs * scores, 0.0), 1)
            total += tl.dot(pairs.to(Cs.dtype), Cs, input_precision="ieee")
        tl.store(key_sums + row + ks, key_sum, mask=is_k)
        tl.store(step_sums + row + ks, tl.sum(wide * du, 1), mask=is_k)
        out = du * step[:, None]
        place = ((start + ks)[:, None] * num_heads + head) * P + ps[None, :]
        is_own = is_k[:, None] & is_p[None, :]
        if HAS_D:
            own = tl.load(dy + place, mask=is_own, other=0.0).to(tl.float32)
            out += own * tl.load(D + head).to(tl.float32)
            tl.store(skip_sums + (chunk * tiles + tile) * num_heads + head, tl.sum(tl.sum(own * wide, 1), 0))
        tl.store(dx + place, out.to(dx.dtype.element_ty), mask=is_own)
    place = ((part.to(tl.int64) * num_tokens + start + ks)[:, None] * num_groups + group) * N + ns[None, :]
    tl.store(dB + place, total.to(dB.dtype.element_ty), mask=is_k[:, None] & is_n[None, :])


@triton.jit
def decay_gradients(
    dt, A, dt_bias, steps, chunks, query_sums, key_sums, leaving_sums, step_sums, across,  # read; across: tiles c h
    ddt, sums_of_chunk,  # written: l h; 2 c h, the gradients of A and of dt_bias
    dt_stride, num_tokens, num_heads, num_chunks,
    TILES: tl.constexpr, CHUNK: tl.constexpr, HAS_BIAS: tl.constexpr, SOFTPLUS: tl.constexpr,
):  # fmt: skip
    """Gradient of the step sizes of one chunk and head."""
    chunk, head = tl.program_id(0).to(tl.int64), tl.program_id(1)
    start = tl.load(chunks + 2 * chunk).to(tl.int64)
    length = tl.load(chunks + 2 * chunk + 1)
    ts = tl.arange(0, CHUNK)
    is_token, tokens = ts < length, start + ts
    place = head.to(tl.int64) * num_tokens + tokens
    query = tl.load(query_sums + place, mask=is_token, other=0.0)
    key = tl.load(key_sums + place, mask=is_token, other=0.0)
    leaving = tl.load(leaving_sums + place, mask=is_token, other=0.0)
    over = tl.cumsum(query - key, 0, reverse=True) + (tl.cumsum(leaving, 0) - leaving)
    for tile in range(0, TILES):
        over += tl.load(across + (tile * num_chunks + chunk) * num_heads + head)
    step = tl.load(steps + place, mask=is_token, other=0.0)
    decay = tl.load(A + head).to(tl.float32)
    # Nothing passes over a token that forgets all: what stands there is what rounding the sums left, times a long step.
    over = tl.where(step * decay < -80.0, 0.0, over)
    dstep = over * decay + tl.load(step_sums + place, mask=is_token, other=0.0)
    if SOFTPLUS:
        _, raw = step_sizes(dt, dt_bias, head, tokens, is_token, dt_stride, HAS_BIAS, False)
        dstep = dstep / (1.0 + tl.exp(-raw))
    dstep = tl.where(is_token, dstep, 0.0)
    tl.store(ddt + tokens * num_heads + head, dstep.to(ddt.dtype.element_ty), mask=is_token)
    at = chunk * num_heads + head
    tl.store(sums_of_chunk + at, tl.sum(tl.where(is_token, over * step, 0.0), 0))
    tl.store(sums_of_chunk + num_chunks.to(tl.int64) * num_heads + at, tl.sum(dstep, 0))
