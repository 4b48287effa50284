// From rows of logits to token ids, where the logits lie; compiled by NVRTC when a model is loaded.
//
// One block works on one row. What is computed is that of llama_runtime.sampling, which is the
// specification, and nothing is sorted: a filter's border and the drawn token are found by
// counting into bins, first by distance from the likeliest, then by the exact value. Weights are
// whole numbers of 2^-SCALE_BITS, so sums don't depend on the order in which threads add. They come
// from float32, where numpy has float64, so a draw that falls next to a border can land on its other
// side: one in many thousands.
//
// NVRTC defines SCALE_BITS, and FLOAT16 or BFLOAT16 where logits are that. Nothing is included, so
// that no toolkit's headers need to be there.

typedef unsigned int u32;
typedef unsigned long long u64;

#if defined(FLOAT16)
typedef unsigned short LOGIT;
#define LOW_BITS 13  // of a float32 that was one: always zero
__device__ float number(LOGIT bits) {
    float value;
    asm("cvt.f32.f16 %0, %1;" : "=f"(value) : "h"(bits));
    return value;
}
#elif defined(BFLOAT16)
typedef unsigned short LOGIT;
#define LOW_BITS 16
__device__ float number(LOGIT bits) { return __uint_as_float((u32)bits << 16); }
#else
typedef float LOGIT;
#define LOW_BITS 0
__device__ float number(LOGIT value) { return value; }
#endif

#define THREADS 1024
#define WARPS (THREADS / 32)
#define LIST 2048  // tokens of one bin that are looked at without reading all logits again
#define BINS THREADS  // each thread owns one where they are added up
#define BINS_A_NAT 32.0f  // so the bins reach weights of e^-32, and the last holds all that is less
#define VECTOR (16 / (int)sizeof(LOGIT))
#define GREEDY 1
#define FILTERED 2
#define EDITED 4
#define MASKED 8
#define IN_PROMPT 0x8000  // of a count: the token is in the prompt; the other bits: in the completion
#define NOT_FINITE -1
#define INFINITE __int_as_float(0x7f800000)

// What a row is drawn by; llama_runtime.backends.cuda_sampler packs it.
struct Row {
    int slot;  // -1: nobody's
    int flags;
    float inverse_temperature;
    int top_k;  // as many as there are logits turns the filter off
    double top_p;
    float min_p, repetition, frequency, presence;
    u64 seed, sample, index;
};

// The larger; not a number if one of the two is none.
__device__ float max_or_nan(float a, float b) {
#if __CUDA_ARCH__ >= 800
    float result;
    asm("max.NaN.f32 %0, %1, %2;" : "=f"(result) : "f"(a), "f"(b));
    return result;
#else
    return a != a || a > b ? a : b;
#endif
}

struct Logits {
    const LOGIT* row;
    const u32* mask;    // a bit a token that may come next; null unless the row is masked
    const float* bias;  // null unless the row is edited
    const unsigned short* counts;
    float repetition, frequency, presence;
    int size;

    __device__ bool as_is() const { return !mask && !bias; }

    __device__ float edit(int i, float value) const {
        if (mask && !(mask[i / 32] >> i % 32 & 1)) return -INFINITE;
        if (!bias) return value;
        value += bias[i];
        const u32 count = counts[i];
        if (count) {
            const u32 completed = count & (IN_PROMPT - 1);
            if (repetition != 1.0f) value = value < 0 ? value * repetition : value / repetition;
            value -= frequency * (float)completed;
            if (completed) value -= presence;
        }
        return value;
    }

    __device__ float at(int i) const { return edit(i, number(row[i])); }

    // Logits from begin on, as a thread of so many sees them: f(index of the first, values, count).
    // Begin is a multiple of VECTOR.
    template <int UNROLL, class F>
    __device__ void walk_vectors(int begin, int end, int thread, int threads, F f) const {
        float values[VECTOR];
        if (size % VECTOR) {
            for (int i = begin + thread; i < end; i += threads) {
                values[0] = at(i);
                f(i, values, 1);
            }
            return;
        }
#pragma unroll UNROLL
        for (int i = begin + thread * VECTOR; i < end; i += threads * VECTOR) {
            const uint4 packed = *reinterpret_cast<const uint4*>(row + i);
            const LOGIT* stored = reinterpret_cast<const LOGIT*>(&packed);
#pragma unroll
            for (int k = 0; k < VECTOR; ++k) values[k] = number(stored[k]);
            if (!as_is())
                for (int k = 0; k < VECTOR && i + k < end; ++k) values[k] = edit(i + k, values[k]);
            f(i, values, min(VECTOR, end - i));
        }
    }

    // The same, one after the other: f(index, value).
    template <class F>
    __device__ void walk(int begin, int end, int thread, int threads, F f) const {
        walk_vectors<2>(begin, end, thread, threads, [&](int i, const float* values, int count) {
            if (count == VECTOR) {
#pragma unroll
                for (int k = 0; k < VECTOR; ++k) f(i + k, values[k]);
            } else {
                for (int k = 0; k < count; ++k) f(i + k, values[k]);
            }
        });
    }

    // All of them, by the block.
    template <class F>
    __device__ void each(F f) const { walk(0, size, threadIdx.x, THREADS, f); }
};

// A float's bits in the order of its value. Values that are equal have equal keys: -0 becomes 0.
__device__ u32 key_of(float value) {
    const u32 bits = __float_as_uint(value + 0.0f);
    return bits & 0x80000000u ? ~bits : bits | 0x80000000u;
}

__device__ float value_of(u32 key) {
    return __uint_as_float(key & 0x80000000u ? key & 0x7fffffffu : ~key);
}

template <class T, class Op>
__device__ T across_block(T value, Op op, T* scratch) {
    for (int offset = 16; offset; offset /= 2)
        value = op(value, (T)__shfl_xor_sync(~0u, value, offset));
    __syncthreads();
    if (threadIdx.x % 32 == 0) scratch[threadIdx.x / 32] = value;
    __syncthreads();
    value = scratch[0];
    for (int w = 1; w < WARPS; ++w) value = op(value, scratch[w]);
    return value;
}

struct Add {
    __device__ u64 operator()(u64 a, u64 b) const { return a + b; }
};
struct Larger {
    __device__ u64 operator()(u64 a, u64 b) const { return a > b ? a : b; }
};
struct Smaller {
    __device__ u64 operator()(u64 a, u64 b) const { return a < b ? a : b; }
};

// How far a value is below the largest, in units of the temperature: 0 to -infinity.
struct Weigher {
    float largest, inverse_temperature;

    __device__ float exponent(float value) const {
        return value == largest ? 0.0f : (value - largest) * inverse_temperature;
    }
    __device__ u64 weight(float value) const {
        return (u64)__float2ull_rn(expf(exponent(value)) * (float)(1ull << SCALE_BITS));
    }
    __device__ int bin(float value) const {
        const float place = fminf(-exponent(value) * BINS_A_NAT, (float)(BINS - 1));
        return __float_as_int(place + 0x1p23f) & (BINS - 1);  // to the nearest; faster than a cast
    }
};

struct Shared {
    u64 scratch[WARPS];
    // Of the first histogram, which stays, and of the one that refines it.
    u32 weights_low[2][BINS], weights_high[2][BINS];
    u32 counts[2][BINS];
    u32 keys[LIST];  // of a bin's tokens, in any order
    int tokens[LIST];
    int ties[THREADS];
    u32 num_listed, num_ties;
    u64 found[5];

    __device__ u64 weight(int histogram, int bin) const {
        return (u64)weights_high[histogram][bin] << 32 | weights_low[histogram][bin];
    }
    // Two additions of 32 bits, because one of 64 is a loop that waits for its turn.
    __device__ void add(int histogram, int bin, u64 weight, bool counted) {
        if (counted) atomicAdd(&counts[histogram][bin], 1u);
        const u32 low = (u32)weight;
        const u32 carry = atomicAdd(&weights_low[histogram][bin], low) > ~low;
        const u32 high = (u32)(weight >> 32) + carry;
        if (high) atomicAdd(&weights_high[histogram][bin], high);
    }
};

// The likeliest value and the first token that has it; NOT_FINITE if any logit is not a number, or
// the largest is not finite.
__device__ __noinline__ int likeliest(const Logits& logits, float* largest, Shared& s) {
    float best = -INFINITE;
    int at = 0;
    bool broken = false;
    // A thread sees tokens in order, and looks closer only at a vector that holds something new.
    const auto look = [&](int i, const float* values, int count) {
        float most = values[0];
        if (count == VECTOR) {
#pragma unroll
            for (int k = 1; k < VECTOR; ++k) most = max_or_nan(most, values[k]);
        } else {
            for (int k = 1; k < count; ++k) most = max_or_nan(most, values[k]);
        }
        if (most > best) {
            best = most;
#pragma unroll
            for (int k = VECTOR - 1; k >= 0; --k)
                if (k < count && values[k] == most) at = i + k;
        }
        broken |= most != most;
    };
    logits.walk_vectors<4>(0, logits.size, threadIdx.x, THREADS, look);
    // Larger is likelier, then earlier.
    const u64 found = across_block((u64)key_of(best) << 32 | (u32)~at, Larger(), s.scratch);
    *largest = value_of((u32)(found >> 32));
    return __syncthreads_or(broken) || isinf(*largest) ? NOT_FINITE : (int)~(u32)found;
}

__device__ u64 part_of(double share, u64 total) {
    const u64 part = (u64)(share * (double)total);
    return part < total ? part : total - 1;
}

// The first token, in order of tokens, at which the running sum of f(index, value) passes target;
// or passes a share of the sum of all, if that isn't negative.
template <class F>
__device__ int locate(const Logits& logits, u64 target, double share, F f, Shared& s) {
    int begin = 0, end = logits.size;
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    do {  // each warp sums a part, and the part that passes is what is left
        const int part = ((end - begin + WARPS - 1) / WARPS + VECTOR - 1) / VECTOR * VECTOR;
        const int first = begin + warp * part;
        u64 sum = 0;
        logits.walk(first, min(first + part, end), lane, 32, [&](int i, float v) { sum += f(i, v); });
        for (int offset = 16; offset; offset /= 2) sum += __shfl_xor_sync(~0u, sum, offset);
        __syncthreads();
        if (lane == 0) s.scratch[warp] = sum;
        __syncthreads();
        if (share >= 0) {
            u64 total = 0;
            for (int w = 0; w < WARPS; ++w) total += s.scratch[w];
            target = part_of(share, total);
            share = -1;
        }
        int chosen = 0;
        while (chosen < WARPS - 1 && target >= s.scratch[chosen]) target -= s.scratch[chosen++];
        begin += chosen * part;
        end = min(begin + part, end);
    } while (end - begin > 32);
    if (warp == 0) {
        u64 sum = begin + lane < end ? f(begin + lane, logits.at(begin + lane)) : 0;
        for (int offset = 1; offset < 32; offset *= 2) {
            const u64 before = __shfl_up_sync(~0u, sum, offset);
            if (lane >= offset) sum += before;
        }
        const u32 passed = __ballot_sync(~0u, sum > target);
        if (lane == 0) s.found[0] = begin + (passed ? __ffs(passed) - 1 : end - begin - 1);
    }
    __syncthreads();
    const int result = (int)s.found[0];
    __syncthreads();
    return result;
}

// Of a histogram, the first bin at which the running sum reaches target, and what lies before it.
struct Bin {
    int index;
    u64 weight_before, count_before;
    u64 weight, count;
};

__device__ __noinline__ Bin find_bin(int histogram, u64 target, bool by_count, Shared& s) {
    const u64 weight = s.weight(histogram, threadIdx.x), count = s.counts[histogram][threadIdx.x];
    u64 sums[2] = {weight, count};  // running ones, this thread's bin included
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    for (u64& sum : sums) {
        for (int offset = 1; offset < 32; offset *= 2) {
            const u64 before = __shfl_up_sync(~0u, sum, offset);
            if (lane >= offset) sum += before;
        }
        __syncthreads();
        if (lane == 31) s.scratch[warp] = sum;
        __syncthreads();
        for (int w = 0; w < warp; ++w) sum += s.scratch[w];
    }
    const u64 before = by_count ? sums[1] - count : sums[0] - weight;
    if (sums[by_count] >= target && before < target) {
        s.found[0] = threadIdx.x;
        s.found[1] = sums[0] - weight;
        s.found[2] = sums[1] - count;
        s.found[3] = weight;
        s.found[4] = count;
    }
    __syncthreads();
    const Bin bin = {(int)s.found[0], s.found[1], s.found[2], s.found[3], s.found[4]};
    __syncthreads();
    return bin;
}

__device__ void clear(int histogram, Shared& s) {
    s.weights_low[histogram][threadIdx.x] = s.weights_high[histogram][threadIdx.x] = 0;
    s.counts[histogram][threadIdx.x] = 0;
    __syncthreads();
}

// Of the tokens with one value, the one at some place in order of tokens.
__device__ __noinline__ int locate_tie(const Logits& logits, u64 value, u64 place, Shared& s) {
    const int low_bits = logits.bias ? 0 : LOW_BITS;
    return locate(
        logits, place, -1, [&](int i, float v) { return (u64)(key_of(v) >> low_bits == value); }, s);
}

// A value in the order from the likeliest on, and the token at which the sum reaches the target.
struct Border {
    u64 before;  // weight of all that are likelier
    u64 each;    // weight of one that has the value
    u64 ties;    // tokens that have it
    u64 needed;  // how many of them, in order of tokens, until the target is reached
    int token;   // the last of those
};

// Narrow the values of one bin down to the one at which the running sum, of weights or of tokens,
// reaches target. each(f) calls f(token, key) for every token of the bin, by the block.
template <class Each>
__device__ u64 narrow(
    const Weigher& weigher, Each each, int low_bits, u64& target, bool by_count, Border& border,
    Shared& s) {
    u64 high = 0, low = ~0ull;
    each([&](int token, u32 key) {
        const u64 place = key >> low_bits;
        high = place > high ? place : high;
        low = place < low ? place : low;
    });
    high = across_block(high, Larger(), s.scratch);
    low = across_block(low, Smaller(), s.scratch);
    while (true) {  // bins of so many values each; at last of one
        int shift = 0;
        while ((high - low) >> shift >= BINS) ++shift;
        clear(1, s);
        each([&](int token, u32 key) {
            const u64 place = key >> low_bits;
            if (place > high || place < low) return;
            s.add(1, (int)((high - place) >> shift), weigher.weight(value_of(key)), true);
        });
        __syncthreads();
        const Bin bin = find_bin(1, target, by_count, s);
        border.before += bin.weight_before;
        target -= by_count ? bin.count_before : bin.weight_before;
        high -= (u64)bin.index << shift;
        if (shift == 0) {
            border.each = bin.weight / bin.count;
            border.ties = bin.count;
            border.needed = by_count ? target : (target + border.each - 1) / border.each;
            return high;
        }
        const u64 width = (1ull << shift) - 1;
        low = high > low + width ? high - width : low;
    }
}

// The border at which the running sum reaches target, which is above 0 and no more than all of it.
// The first histogram must be there, with counts if it is by count.
__device__ __noinline__ Border select(
    const Logits& logits, const Weigher& weigher, u64 target, bool by_count, bool want_token,
    Shared& s) {
    const int low_bits = logits.bias ? 0 : LOW_BITS;
    const Bin outer = find_bin(0, target, by_count, s);
    Border border = {outer.weight_before, 0, 0, 0, 0};
    target -= by_count ? outer.count_before : outer.weight_before;
    // Most values need no closer look than at where the bin can lie at all.
    const float width = 1.0f / (BINS_A_NAT * weigher.inverse_temperature);
    const float middle = weigher.largest - outer.index * width;
    const float slack = 0.6f * width + 1e-5f * (fabsf(weigher.largest) + outer.index * width);
    const float top = outer.index ? middle + slack : INFINITE;
    const float bottom = outer.index < BINS - 1 ? middle - slack : -INFINITE;
    const auto of_row = [&](auto f) {
        logits.each([&](int i, float value) {
            if (value <= top && value >= bottom && weigher.bin(value) == outer.index)
                f(i, key_of(value));
        });
    };
    if (threadIdx.x == 0) s.num_listed = s.num_ties = 0;
    __syncthreads();
    of_row([&](int token, u32 key) {
        const u32 place = atomicAdd(&s.num_listed, 1u);
        if (place < LIST) s.keys[place] = key, s.tokens[place] = token;
    });
    __syncthreads();
    const u32 listed = s.num_listed;
    const auto of_list = [&](auto f) {
        for (u32 i = threadIdx.x; i < listed; i += THREADS) f(s.tokens[i], s.keys[i]);
    };
    if (listed > LIST) {  // a flat distribution: read the row again, and again
        const u64 value = narrow(weigher, of_row, low_bits, target, by_count, border, s);
        if (want_token) border.token = locate_tie(logits, value, border.needed - 1, s);
        return border;
    }
    const u64 value = narrow(weigher, of_list, low_bits, target, by_count, border, s);
    if (!want_token) return border;
    of_list([&](int token, u32 key) {
        if (key >> low_bits != value) return;
        const u32 place = atomicAdd(&s.num_ties, 1u);
        if (place < THREADS) s.ties[place] = token;
    });
    __syncthreads();
    const u32 ties = min(s.num_ties, (u32)THREADS);
    if (s.num_ties > THREADS) {
        border.token = locate_tie(logits, value, border.needed - 1, s);
        return border;
    }
    if (threadIdx.x < ties) {
        u32 rank = 0;
        for (u32 i = 0; i < ties; ++i) rank += s.ties[i] < s.ties[threadIdx.x];
        if (rank == border.needed - 1) s.found[0] = s.ties[threadIdx.x];
    }
    __syncthreads();
    border.token = (int)s.found[0];
    __syncthreads();
    return border;
}

// Philox 4x64-10 (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", 2011): the first
// word at counter (index + 1, 0, 0, 0), as a number in [0, 1) with 53 bits.
__device__ double uniform(u64 seed, u64 sample, u64 index) {
    u64 c0 = index + 1, c1 = 0, c2 = 0, c3 = 0;
    for (int round = 0; round < 10; ++round) {
        const u64 high0 = __umul64hi(0xD2E7470EE14C6C93ull, c0), low0 = 0xD2E7470EE14C6C93ull * c0;
        const u64 high1 = __umul64hi(0xCA5A826395121157ull, c2), low1 = 0xCA5A826395121157ull * c2;
        c0 = high1 ^ c1 ^ seed;
        c1 = low1;
        c2 = high0 ^ c3 ^ sample;
        c3 = low0;
        seed += 0x9E3779B97F4A7C15ull;
        sample += 0xBB67AE8584CAA73Bull;
    }
    return (double)(c0 >> 11) * 0x1p-53;
}

__device__ __noinline__ int draw_whole(const Logits& logits, const Weigher& weigher, double at, Shared& s) {
    return locate(logits, 0, at, [&](int i, float v) { return weigher.weight(v); }, s);
}

__device__ __noinline__ int draw_filtered(
    const Logits& logits, const Weigher& weigher, const Row& row, double at, Shared& s) {
    const bool counted = row.top_k < logits.size;
    clear(0, s);
    u64 total = 0, last_weight = 0;
    u32 last_count = 0;  // most tokens are in the last bin, and would wait for each other there
    logits.each([&](int i, float value) {
        const u64 weight = weigher.weight(value);
        const int bin = weigher.bin(value);
        total += weight;
        if (bin == BINS - 1) {
            last_weight += weight;
            ++last_count;
        } else {
            s.add(0, bin, weight, counted);
        }
    });
    total = across_block(total, Add(), s.scratch);
    const u64 many = across_block((u64)last_count, Add(), s.scratch);
    const u64 weighed = across_block(last_weight, Add(), s.scratch);
    if (threadIdx.x == 0) {
        s.counts[0][BINS - 1] = (u32)many;
        s.weights_low[0][BINS - 1] = (u32)weighed;
        s.weights_high[0][BINS - 1] = (u32)(weighed >> 32);
    }
    __syncthreads();
    u64 kept = total;
    if (counted) {
        const Border border = select(logits, weigher, row.top_k, true, false, s);
        kept = border.before + border.ties * border.each;
    }
    if (row.top_p < 1) {
        u64 target = (u64)ceil(row.top_p * (double)kept);
        target = target < 1 ? 1 : target > kept ? kept : target;
        const Border border = select(logits, weigher, target, false, false, s);
        kept = border.before + border.needed * border.each;
    }
    if (row.min_p > 0) {
        u64 likely = 0;
        logits.each([&](int i, float value) {
            if (expf(weigher.exponent(value)) >= row.min_p) likely += weigher.weight(value);
        });
        likely = across_block(likely, Add(), s.scratch);
        kept = likely < kept ? likely : kept;
    }
    return select(logits, weigher, part_of(at, kept) + 1, false, true, s).token;
}

__device__ Logits logits_of(
    const LOGIT* logits, const Row* row, const u32* masks, const float* bias,
    const unsigned short* counts, int vocab_size, int index) {
    Logits result = {logits + (size_t)index * vocab_size, 0, 0, 0, 1.0f, 0, 0, vocab_size};
    if (row && row->flags & MASKED)
        result.mask = masks + (size_t)index * ((vocab_size + 31) / 32);
    if (row && row->flags & EDITED) {
        result.bias = bias + (size_t)row->slot * vocab_size;
        result.counts = counts + (size_t)row->slot * vocab_size;
        result.repetition = row->repetition;
        result.frequency = row->frequency;
        result.presence = row->presence;
    }
    return result;
}

// The next token of each row: to tokens[row], which the host reads, and to next[slot], which the
// next step reads. Grid: one block a row.
extern "C" __global__ void __launch_bounds__(THREADS, 1) sample(
    const LOGIT* logits, const Row* rows, const u32* masks, const float* bias,
    unsigned short* counts, int vocab_size, int* next, int* tokens) {
    __shared__ Shared s;
    const Row row = rows[blockIdx.x];
    if (row.slot < 0) return;
    const Logits own = logits_of(logits, &row, masks, bias, counts, vocab_size, blockIdx.x);
    float largest;
    int token = likeliest(own, &largest, s);
    if (token != NOT_FINITE && !(row.flags & GREEDY)) {
        const Weigher weigher = {largest, row.inverse_temperature};
        const double at = uniform(row.seed, row.sample, row.index);
        token = row.flags & FILTERED ? draw_filtered(own, weigher, row, at, s)
                                     : draw_whole(own, weigher, at, s);
    }
    if (threadIdx.x == 0) {
        tokens[blockIdx.x] = token;
        next[row.slot] = token;
        if (row.flags & EDITED && token >= 0) {
            unsigned short* count = counts + (size_t)row.slot * vocab_size + token;
            if ((*count & (IN_PROMPT - 1)) < IN_PROMPT - 1) ++*count;
        }
    }
}

// Log-probabilities of one token of some rows, and of the likeliest num_top ones beside it.
// A wanted token of -1 means the one that was sampled. Grid: one block a scored row.
extern "C" __global__ void __launch_bounds__(THREADS, 1) score(
    const LOGIT* logits, const int* rows, const int* wanted, const int* tokens, int vocab_size,
    int num_top, double* logprobs, int* top_tokens, double* top_logprobs) {
    __shared__ Shared s;
    const int index = rows[blockIdx.x];
    const Logits own = logits_of(logits, 0, 0, 0, 0, vocab_size, index);
    float largest;
    const int best = likeliest(own, &largest, s);
    const Weigher weigher = {largest, 1.0f};
    u64 total = 0;
    own.each([&](int i, float value) { total += weigher.weight(value); });
    total = across_block(total, Add(), s.scratch);
    const double whole = log((double)total) - SCALE_BITS * 0.6931471805599453094;
    const double scale = best == NOT_FINITE ? nan("") : whole;
    int token = wanted[blockIdx.x];
    token = token < 0 ? max(tokens[index], 0) : token;
    if (threadIdx.x == 0) logprobs[blockIdx.x] = (double)own.at(token) - largest - scale;
    u64 last = ~0ull;
    for (int place = 0; place < num_top; ++place) {
        u64 next = 0;
        own.each([&](int i, float value) {
            const u64 candidate = (u64)key_of(value) << 32 | (u32)~i;
            if (candidate < last && candidate > next) next = candidate;
        });
        last = across_block(next, Larger(), s.scratch);
        if (threadIdx.x == 0) {
            const size_t at = (size_t)blockIdx.x * num_top + place;
            top_tokens[at] = (int)~(u32)last;
            top_logprobs[at] = (double)value_of((u32)(last >> 32)) - largest - scale;
        }
    }
}

// The ids that a step begins with: what the host knows, and the newest token of slot -1 - given
// where it doesn't yet.
extern "C" __global__ void feed(const int* given, const int* next, long long* input_ids, int size) {
    const int i = blockIdx.x * blockDim.x + threadIdx.x;
    if (i < size) input_ids[i] = given[i] >= 0 ? given[i] : max(next[-1 - given[i]], 0);
}

// Written into one slot's row of a table.
extern "C" __global__ void scatter_bias(
    float* bias, const int* ids, const float* values, int size) {
    const int i = blockIdx.x * blockDim.x + threadIdx.x;
    if (i < size) bias[ids[i]] = values[i];
}

extern "C" __global__ void scatter_counts(
    unsigned short* counts, const int* ids, const int* values, int size) {
    const int i = blockIdx.x * blockDim.x + threadIdx.x;
    if (i < size) counts[ids[i]] = (unsigned short)values[i];
}
