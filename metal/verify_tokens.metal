// Which drafted tokens the target keeps, and the token it adds, on the device: csrc/verify_tokens.hpp bit for bit.
//
// Three launches. verify_scan: one threadgroup of 32: how far the drafted tokens may be kept, and which rows' masses
// decide. verify_masses: grid (ceil(V / 4096), gamma + 1, 1), 256 threads: what the draft leaves of these rows, in
// chunks of 256 ids. verify_pick: one threadgroup of 32: tau, and the draw of the residual or the bonus. With gamma 0
// they draw from p, as a draft does. verify_greedy, one threadgroup of 32, does without laws.
//
// p (gamma + 1, V), q (gamma, Vq) float32; tokens int32, the drafted ones from tokens[first] on; draws are made from the
// counters of settings. settings: see the names below. prefixes (gamma + 1,), masses (gamma + 1, ceil(V / 256))
// binary64. out[slot] is the next token and, unless slot is 0, out[slot - 1] becomes tau if `with_tau`.
#include "law.h"

enum Setting {
  GAMMA = 0,
  VOCAB = 1,
  DRAFT_VOCAB = 2,  // ids from here on have no draft mass; 0: the draft is certain of its tokens
  RULE = 3,         // 0 token, 1 block
  SEED = 4,         // low and high words
  ROUND = 6,
  LENIENCE = 8,  // a binary64
  PURPOSE = 10,  // of the last draw, RESIDUAL when verifying
  POSITION = 11,  // of the last draw in the round
  FIRST = 12,
  SLOT = 13,
  WITH_TAU = 14,
};

METAL_FUNC ulong wide(device const int* settings, int at) {
  return (ulong(uint(settings[at + 1])) << 32) | uint(settings[at]);
}

/// The draft's probability of token x in row i.
METAL_FUNC ulong drafted(device const float* q, int Vq, int x, int i) {
  if (Vq == 0) return B64_ONE;
  return x >= 0 && x < Vq ? b64_of(q[size_t(i) * Vq + x]) : 0;
}

/// What the draft takes from the row whose share `prefix` is left: of prefix p(id) the minimum of q(id) and kept prefix
/// p(id). The result is what is left.
METAL_FUNC ulong left_of(float p, int id, ulong prefix, ulong kept, bool takes, device const float* q, int Vq,
                         int token) {
  const ulong mass = b64_multiply(prefix, b64_of(p));
  if (!takes) return mass;
  const ulong most = b64_multiply(kept, mass);
  const ulong taken = Vq == 0 ? (id == token ? B64_ONE : 0ul) : (id < Vq ? b64_of(q[id]) : 0ul);
  return b64_subtract(mass, b64_less(most, taken) ? most : taken);
}

/// A row and what the draft takes from it.
struct Residual {
  ulong prefix, kept;
  bool takes;
  int token;
};
METAL_FUNC Residual residual_of(device const int* settings, device const int* tokens, int row, ulong prefix) {
  const ulong lenience = wide(settings, LENIENCE);
  Residual r;
  r.takes = row < settings[GAMMA];
  r.prefix = r.takes ? prefix : B64_ONE;
  r.kept = b64_less(lenience, B64_ONE) ? lenience : B64_ONE;
  r.token = r.takes ? tokens[settings[FIRST] + row] : -1;
  return r;
}

METAL_FUNC void verify_scan_impl(device const float* p, device const float* q, device const int* tokens,
                                 device const int* settings, device ulong* prefixes, uint lane) {
  if (lane > 0) return;
  const int gamma = settings[GAMMA], V = settings[VOCAB], Vq = settings[DRAFT_VOCAB];
  for (int i = 0; i <= gamma; i++) prefixes[i] = 0;
  const bool by_block = settings[RULE] == 1;
  ulong prefix = B64_ONE;
  int row = 0;
  for (; row < gamma; row++) {
    const int x = tokens[settings[FIRST] + row];
    const ulong px = x >= 0 && x < V ? b64_of(p[size_t(row) * V + x]) : 0, qx = drafted(q, Vq, x, row);
    if (by_block) {
      prefixes[row] = prefix;
      const ulong most = b64_multiply(prefix, px);
      if (b64_less(most, qx)) {
        prefix = b64_divide(most, qx);
      } else if (b64_positive(most) && !b64_is_nan(qx)) {
        prefix = B64_ONE;
      } else {
        prefix = b64_subtract(most, qx);
      }
      if (!b64_positive(prefix)) return;
    } else {
      const ulong u = uniform_draw(wide(settings, SEED), wide(settings, ROUND), uint(row), ACCEPT);
      if (!b64_less(b64_multiply(u, qx), b64_multiply(wide(settings, LENIENCE), px))) break;
    }
  }
  prefixes[row] = prefix;
}

METAL_FUNC void verify_masses_impl(device const float* p, device const float* q, device const int* tokens,
                                   device const int* settings, device const ulong* prefixes, device ulong* masses,
                                   uint2 group, uint simdgroup, uint lane) {
  const int V = settings[VOCAB], Vq = settings[DRAFT_VOCAB], row = int(group.y);
  const ulong prefix = prefixes[row];
  if (prefix == 0) return;
  const Residual r = residual_of(settings, tokens, row, prefix);
  const int chunks = (V + CHUNK - 1) / CHUNK, chunk = int(group.x) * 16 + int(simdgroup) * 2 + int(lane) / 16;
  ulong mass = 0;
  for (int i = 0; i < 16; i++) {
    const int id = chunk * CHUNK + i * 16 + int(lane) % 16;
    if (id >= V) break;
    mass = b64_add(mass, left_of(p[size_t(row) * V + id], id, r.prefix, r.kept, r.takes, q + size_t(row) * Vq, Vq,
                                 r.token));
  }
  mass = sum_of_chunk(mass);
  if (lane % 16 == 0 && chunk < chunks) masses[size_t(row) * chunks + chunk] = mass;
}

/// The inverse CDF of what is left of a row, in order of ids, at u of its mass; -1 if there is none. One simdgroup.
METAL_FUNC int pick_token(device const float* p, device const float* q, device const ulong* masses, Residual r, int V,
                          int Vq, ulong total, ulong u, threadgroup ulong* left, uint lane) {
  if (!b64_positive(total)) return -1;
  const ulong wanted = b64_multiply(u, total);
  ulong before = 0, running = 0;
  int block = -1;
  for (int b = 0; b < blocks_of(V) && (block < 0 || !b64_less(wanted, running)); b++) {
    const ulong mass = mass_of_block(masses, V, b);
    if (!b64_positive(mass)) continue;
    block = b;
    before = running;
    running = b64_add(running, mass);
  }
  int token = -1;
  for (int c = block * chunks_of_block(V); c < (block + 1) * chunks_of_block(V); c++) {
    simdgroup_barrier(mem_flags::mem_threadgroup);
    for (int i = int(lane); i < CHUNK; i += 32) {
      const int id = c * CHUNK + i;
      left[i] = id < V ? left_of(p[id], id, r.prefix, r.kept, r.takes, q, Vq, r.token) : 0ul;
    }
    simdgroup_barrier(mem_flags::mem_threadgroup);
    for (int i = 0; i < CHUNK; i++) {
      if (!b64_positive(left[i]) || (token >= 0 && b64_less(wanted, before))) continue;
      token = c * CHUNK + i;
      before = b64_add(before, left[i]);
    }
  }
  return token;
}

METAL_FUNC void verify_pick_impl(device const float* p, device const float* q, device const int* tokens,
                                 device const int* settings, device const ulong* prefixes, device int* out,
                                 device ulong* masses, threadgroup ulong* left, uint lane) {
  const int gamma = settings[GAMMA], V = settings[VOCAB], Vq = settings[DRAFT_VOCAB];
  const int chunks = (V + CHUNK - 1) / CHUNK;
  int tau = 0;
  ulong prefix = B64_ONE, total = 0;
  for (int row = 0; row <= gamma; row++) {
    const ulong c = prefixes[row];
    if (c == 0) continue;
    if (settings[RULE] == 1 && row == gamma && row > 0) {
      const ulong u = uniform_draw(wide(settings, SEED), wide(settings, ROUND), uint(row - 1), ACCEPT);
      if (!b64_less(u, c)) continue;
      total = total_of(masses + size_t(row) * chunks, V);
    } else {
      const ulong own = total_of(masses + size_t(row) * chunks, V);
      if (settings[RULE] == 1 && row > 0) {
        const ulong u = uniform_draw(wide(settings, SEED), wide(settings, ROUND), uint(row - 1), ACCEPT);
        if (!b64_less(b64_multiply(u, b64_add(own, b64_subtract(B64_ONE, c))), own)) continue;
      }
      total = own;
    }
    tau = row;
    prefix = c;
  }
  const ulong u = uniform_draw(wide(settings, SEED), wide(settings, ROUND), uint(settings[POSITION]), uint(settings[PURPOSE]));
  device const float* row_p = p + size_t(tau) * V;
  device const float* row_q = q + size_t(tau) * Vq;
  device ulong* row_masses = masses + size_t(tau) * chunks;
  const Residual residual = residual_of(settings, tokens, tau, prefix);
  int next = pick_token(row_p, row_q, row_masses, residual, V, Vq, total, u, left, lane);
  if (next < 0) {  // nothing is left of p: it is drawn from as a whole
    Residual whole = residual;
    whole.takes = false;
    whole.prefix = B64_ONE;
    for (int c = int(lane) / 16; c < (chunks + 1) / 2 * 2; c += 2) {
      ulong mass = 0;
      for (int i = int(lane) % 16; i < CHUNK; i += 16) {
        const int id = c * CHUNK + i;
        if (id < V) mass = b64_add(mass, b64_of(row_p[id]));
      }
      mass = sum_of_chunk(mass);
      if (lane % 16 == 0 && c < chunks) row_masses[c] = mass;
    }
    threadgroup_barrier(mem_flags::mem_device);
    total = total_of(row_masses, V);
    next = pick_token(row_p, row_q, row_masses, whole, V, Vq, total, u, left, lane);
  }
  if (lane > 0) return;
  if (settings[WITH_TAU] != 0) out[settings[SLOT] - 1] = tau;
  out[settings[SLOT]] = next;
}

/// Keeps drafted tokens while they are the target's arg max; best is logits_best's.
METAL_FUNC void verify_greedy_impl(device const float* best, device const int* tokens, device const int* settings,
                                   device int* out, uint lane) {
  if (lane > 0) return;
  int tau = 0;
  while (tau < settings[GAMMA] && tokens[settings[FIRST] + tau] == int(best[4 * tau + 1])) tau++;
  if (settings[WITH_TAU] != 0) out[settings[SLOT] - 1] = tau;
  out[settings[SLOT]] = int(best[4 * tau + 1]);
}

#ifndef SPECFAST_NO_ENTRY
[[kernel]] void verify_scan(device const float* p [[buffer(0)]], device const float* q [[buffer(1)]],
                            device const int* tokens [[buffer(2)]], device const int* settings [[buffer(3)]],
                            device ulong* prefixes [[buffer(4)]], uint lane [[thread_index_in_simdgroup]]) {
  verify_scan_impl(p, q, tokens, settings, prefixes, lane);
}

[[kernel]] void verify_masses(device const float* p [[buffer(0)]], device const float* q [[buffer(1)]],
                              device const int* tokens [[buffer(2)]], device const int* settings [[buffer(3)]],
                              device const ulong* prefixes [[buffer(4)]], device ulong* masses [[buffer(5)]],
                              uint3 group [[threadgroup_position_in_grid]],
                              uint simdgroup [[simdgroup_index_in_threadgroup]],
                              uint lane [[thread_index_in_simdgroup]]) {
  verify_masses_impl(p, q, tokens, settings, prefixes, masses, group.xy, simdgroup, lane);
}

[[kernel]] void verify_pick(device const float* p [[buffer(0)]], device const float* q [[buffer(1)]],
                            device const int* tokens [[buffer(2)]], device const int* settings [[buffer(3)]],
                            device const ulong* prefixes [[buffer(4)]], device int* out [[buffer(5)]],
                            device ulong* masses [[buffer(6)]], uint lane [[thread_index_in_simdgroup]]) {
  threadgroup ulong left[CHUNK];
  verify_pick_impl(p, q, tokens, settings, prefixes, out, masses, left, lane);
}

[[kernel]] void verify_greedy(device const float* best [[buffer(0)]], device const int* tokens [[buffer(1)]],
                              device const int* settings [[buffer(2)]], device int* out [[buffer(3)]],
                              uint lane [[thread_index_in_simdgroup]]) {
  verify_greedy_impl(best, tokens, settings, out, lane);
}
#endif
