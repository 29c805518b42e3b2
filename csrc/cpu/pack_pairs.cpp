// Writes entries as chunks of pairs, each where shared memory answers the warps that read it
// soonest. The surprise: two kernels read the same chunks, a warp of `direct` 32 neighbours of one
// row, a warp of `matmul` two of each of 16 rows, and an order that suits both suits each as well
// as its own.
//
// Lanes that want different words of one of 32 banks wait for each other. At once a warp takes pair
// j of all its chunks, so entries may be moved among the chunks and positions of their run (one row
// and window) until few meet. Entry by entry, each goes where the banks it needs are furthest from
// being the ones that their warps wait for.
#include "pack_pairs.h"

#include <algorithm>
#include <cstring>

namespace placekern {
namespace {

constexpr int kBanks = 32;     // of four bytes; also the lanes of a warp
constexpr int kWarpRows = 16;  // that a warp of `matmul` puts into shared memory at once,
constexpr int kRowChunks = 2;  // and how many chunks of each
constexpr int kRowShift = 4;   // banks from a row of its tile to the next

constexpr int chunks_of(int entries) { return (entries + kChunk - 1) / kChunk; }

constexpr int kMostChunks = chunks_of(kPairsWindow);  // of a run

// What it costs to use a bank once more than the most used one is; half of it if the bank is used
// once less, and so on. More or less steep, it made no difference.
constexpr int kCost = 32;
constexpr uint8_t kTaken = 0x80;  // added to a sum of two costs

using Positions = uint64_t;  // a byte for each position of a chunk
static_assert(sizeof(Positions) == kChunk && 2 * kCost < kTaken);

// How often the lanes of a warp use each bank, position by position.
class Banks {
  public:
    void clear() {
        std::memset(used_, 0, sizeof(used_));
        std::memset(most_, 0, sizeof(most_));
        std::memset(cost_, kCost, sizeof(cost_));
    }

    Positions cost(int bank) const {
        Positions word;
        std::memcpy(&word, cost_[bank], sizeof(word));
        return word;
    }

    void use(int bank, int position) {
        if (++used_[bank][position] > most_[position]) {
            ++most_[position];
            for (int b = 0; b < kBanks; ++b) weigh(b, position);
        } else {
            weigh(bank, position);
        }
    }

  private:
    void weigh(int bank, int position) {
        const int less = most_[position] - used_[bank][position];
        cost_[bank][position] = static_cast<uint8_t>(kCost >> std::min(less, 7));
    }

    uint8_t used_[kBanks][kChunk], most_[kChunk], cost_[kBanks][kChunk];
};

// How many entries row m has in a window, the first of them being `entry`.
int run_length(const int64_t* row_ptr, const int32_t* col_ind, int64_t m, int64_t window,
               int64_t entry) {
    const int64_t end = (window + 1) * kPairsWindow;
    int64_t last = entry;
    while (last < row_ptr[m + 1] && col_ind[last] < end) ++last;
    return static_cast<int>(last - entry);
}

int64_t windows_of(int64_t K) { return (K + kPairsWindow - 1) / kPairsWindow; }

// Packs a run: `count` entries from `entry` on, into the chunks that start with number `chunk` of
// their row. `direct`: of that row's even and odd warps; `matmul`: of the window's warps.
void pack_run(const PackPairsArgs& args, int64_t m, int64_t window, int64_t entry, int count,
              int chunk, Banks (&direct)[2], Banks* matmul) {
    const int own = chunks_of(count);
    const int row_shift = static_cast<int>(m % kWarpRows) * kRowShift;
    uint8_t* const chunks = args.chunks + 2 * kChunk * (args.chunk_ptr[m] + int64_t{chunk});
    const auto direct_of = [&](int i) -> Banks& { return direct[(chunk + i) / kBanks % 2]; };
    for (int i = 0; i < own; ++i)
        if ((chunk + i) % kBanks == 0) direct_of(i).clear();  // a warp's first

    Positions taken[kMostChunks] = {};
    for (int n = 0; n < own * kChunk; ++n) {
        // Behind the entries of a run comes padding, each in another place: two lanes may write it.
        const int place = n < count
                              ? static_cast<int>(args.col_ind[entry + n] - window * kPairsWindow)
                              : kPairsWindow + n - count;
        const int bank = place / 2 % kBanks;  // numbers of 16 bits
        const int tile_bank = (bank + row_shift) % kBanks;
        uint8_t cost[kMostChunks * kChunk];
        for (int i = 0; i < own; ++i) {
            const Positions sum =
                direct_of(i).cost(bank) + matmul[i / kRowChunks].cost(tile_bank) + taken[i];
            std::memcpy(cost + i * kChunk, &sum, kChunk);
        }
        const int slots = own * kChunk;
        uint8_t least = kTaken;
        for (int i = 0; i < slots; ++i) least = std::min(least, cost[i]);
        const auto* const found = static_cast<const uint8_t*>(std::memchr(cost, least, slots));
        const int i = static_cast<int>(found - cost) / kChunk;
        const int position = static_cast<int>(found - cost) % kChunk;
        reinterpret_cast<uint8_t*>(&taken[i])[position] = kTaken;
        direct_of(i).use(bank, position);
        matmul[i / kRowChunks].use(tile_bank, position);
        uint8_t* const to = chunks + 2 * kChunk * i + position;
        to[0] = static_cast<uint8_t>(place);
        to[kChunk] = n < count ? args.codes[entry + n] : 0;
    }
}

}  // namespace

void count_chunks(int64_t M, int64_t K, const int64_t* row_ptr, const int32_t* col_ind,
                  uint8_t* run_chunks, int threads) {
    const int64_t windows = windows_of(K);
#pragma omp parallel for num_threads(threads)
    for (int64_t m = 0; m < M; ++m) {
        int64_t entry = row_ptr[m];
        for (int64_t window = 0; window < windows; ++window) {
            const int count = run_length(row_ptr, col_ind, m, window, entry);
            run_chunks[m * windows + window] = static_cast<uint8_t>(chunks_of(count));
            entry += count;
        }
    }
}

void pack_pairs(const PackPairsArgs& args) {
    const int64_t windows = windows_of(args.K);
    const int64_t blocks = (args.M + kWarpRows - 1) / kWarpRows;
#pragma omp parallel for schedule(dynamic) num_threads(args.threads)
    for (int64_t block = 0; block < blocks; ++block) {
        const int64_t first = block * kWarpRows;
        const int rows = static_cast<int>(std::min<int64_t>(kWarpRows, args.M - first));
        Banks direct[kWarpRows][2], matmul[(kMostChunks + kRowChunks - 1) / kRowChunks];
        int64_t entry[kWarpRows];
        int chunk[kWarpRows] = {};
        for (int r = 0; r < rows; ++r) entry[r] = args.row_ptr[first + r];
        for (int64_t window = 0; window < windows; ++window) {
            for (Banks& banks : matmul) banks.clear();
            for (int r = 0; r < rows; ++r) {
                const int64_t m = first + r;
                const int count = run_length(args.row_ptr, args.col_ind, m, window, entry[r]);
                pack_run(args, m, window, entry[r], count, chunk[r], direct[r], matmul);
                entry[r] += count;
                chunk[r] += chunks_of(count);
            }
        }
    }
}

}  // namespace placekern
