#include "table_cache.h"

#include <algorithm>
#include <cstdint>
#include <iterator>
#include <limits>

namespace fastclip::cuda {
namespace {

// Tables are copied in words of this many bytes.
constexpr size_t kWordBytes = 16;

// Device memory grows in powers of two from here, so that growing lists leave little behind.
constexpr size_t kMinCapacity = 128 * 1024;

bool overlap(const std::vector<SpanEntry>& entries) {
  std::vector<std::pair<uintptr_t, uintptr_t>> ranges;
  ranges.reserve(entries.size());
  for (const SpanEntry& entry : entries) {
    const auto begin = reinterpret_cast<uintptr_t>(entry.data);
    if (entry.numel > 0) ranges.emplace_back(begin, begin + entry.numel * item_size(entry.dtype));
  }
  std::sort(ranges.begin(), ranges.end());
  for (size_t i = 1; i < ranges.size(); ++i) {
    if (ranges[i].first < ranges[i - 1].second) return true;
  }
  return false;
}

bool aligned(const void* data, uint8_t dtype) {
  return reinterpret_cast<uintptr_t>(data) % item_size(static_cast<DType>(dtype)) == 0;
}

template <class Table>
size_t nbytes_of(const Table& table) {
  return table.entries.size() * sizeof(table.entries.front());
}

template <class Table>
void place(Table& table, void* device_memory) {
  table.on_device = static_cast<decltype(table.on_device)>(device_memory);
}

}  // namespace

bool Table::matches(const Source& source) const {
  if (static_cast<int64_t>(entries.size()) != source.size + 1) return false;
  for (int64_t i = 0; i < source.size; ++i) {
    const SpanEntry& entry = entries[i];
    const FastclipCudaSpan& span = source.spans[i];
    if (entry.data != span.data || entry.numel != span.numel ||
        static_cast<uint8_t>(entry.dtype) != span.dtype) {
      return false;
    }
  }
  return true;
}

int Table::build(const Source& source) {
  on_device = nullptr;
  entries.clear();
  entries.reserve(source.size + 1);
  uint64_t tiles = 0;
  for (int64_t i = 0; i < source.size; ++i) {
    const FastclipCudaSpan& span = source.spans[i];
    if (span.dtype >= kNumDTypes) return FASTCLIP_CUDA_BAD_DTYPE;
    const auto dtype = static_cast<DType>(span.dtype);
    if (span.numel > 0 && !aligned(span.data, span.dtype)) return FASTCLIP_CUDA_MISALIGNED;
    entries.push_back({span.data, span.numel, static_cast<uint32_t>(tiles), dtype});
    const int64_t elements_per_tile = kTileBytes / item_size(dtype);
    tiles += static_cast<uint64_t>((span.numel + elements_per_tile - 1) / elements_per_tile);
    if (tiles > std::numeric_limits<uint32_t>::max()) return FASTCLIP_CUDA_TOO_LARGE;
  }
  num_tiles = static_cast<uint32_t>(tiles);
  overlapping = overlap(entries);
  entries.push_back({nullptr, 0, num_tiles, DType::kFloat32});
  return FASTCLIP_CUDA_OK;
}

bool TargetTable::matches(const Source& source) const {
  const auto same = [](const FastclipCudaStepTarget& a, const FastclipCudaStepTarget& b) {
    return a.param == b.param && std::equal(std::begin(a.state), std::end(a.state), b.state) &&
           a.step == b.step && a.rule == b.rule && a.state_dtype == b.state_dtype &&
           a.step_dtype == b.step_dtype;
  };
  return static_cast<int64_t>(entries.size()) == source.size &&
         std::equal(entries.begin(), entries.end(), source.targets, same);
}

int TargetTable::build(const Source& source) {
  entries.assign(source.targets, source.targets + source.size);
  for (const FastclipCudaStepTarget& target : entries) {
    if (target.state_dtype >= kNumDTypes || target.step_dtype > FASTCLIP_CUDA_FLOAT64) {
      return FASTCLIP_CUDA_BAD_DTYPE;
    }
    for (const void* state : target.state) {
      if (!aligned(state, target.state_dtype)) return FASTCLIP_CUDA_MISALIGNED;
    }
    if (!aligned(target.step, target.step_dtype)) return FASTCLIP_CUDA_MISALIGNED;
  }
  return FASTCLIP_CUDA_OK;
}

template <class Table>
int TableCache<Table>::find(StreamId stream, const typename Table::Source& source, TableMemory& memory,
                            const Table** found) {
  const bool by_value = Table::fits_arguments(source);
  if (stream == kCaptured && !by_value) return find_captured(source, memory, found);

  auto& slots = slots_[stream];
  Slot* oldest = nullptr;
  for (auto& slot : slots) {
    if (slot->table.matches(source)) {
      slot->last_use = ++clock_;
      *found = &slot->table;
      return FASTCLIP_CUDA_OK;
    }
    if (oldest == nullptr || slot->last_use < oldest->last_use) oldest = slot.get();
  }
  if (slots.size() < kTablesPerStream) {
    slots.push_back(std::make_unique<Slot>());
    oldest = slots.back().get();
  }

  Table& table = oldest->table;
  int status = table.build(source);
  if (status == FASTCLIP_CUDA_OK && !by_value) {
    const size_t nbytes = nbytes_of(table);
    if (oldest->capacity < nbytes) {
      size_t capacity = kMinCapacity;
      while (capacity < nbytes) capacity *= 2;
      status = memory.allocate(capacity, &oldest->device_memory);
      oldest->capacity = status == FASTCLIP_CUDA_OK ? capacity : 0;
    }
    place(table, oldest->device_memory);
    if (status == FASTCLIP_CUDA_OK) {
      status = memory.upload(table.entries.data(), nbytes, oldest->device_memory);
    }
  }
  if (status != FASTCLIP_CUDA_OK) {
    table.entries.clear();  // matches nothing
    return status;
  }
  oldest->last_use = ++clock_;
  *found = &table;
  return FASTCLIP_CUDA_OK;
}

template <class Table>
int TableCache<Table>::find_captured(const typename Table::Source& source, TableMemory& memory,
                                     const Table** found) {
  for (const auto& table : captured_) {
    if (table->matches(source)) {
      *found = table.get();
      return FASTCLIP_CUDA_OK;
    }
  }
  auto table = std::make_unique<Table>();
  int status = table->build(source);
  if (status != FASTCLIP_CUDA_OK) return status;
  void* device_memory = nullptr;
  const size_t nbytes = nbytes_of(*table);
  status = memory.allocate((nbytes + kWordBytes - 1) / kWordBytes * kWordBytes, &device_memory);
  place(*table, device_memory);
  if (status == FASTCLIP_CUDA_OK) {
    status = memory.upload_outside_capture(table->entries.data(), nbytes, device_memory);
  }
  if (status != FASTCLIP_CUDA_OK) return status;
  *found = table.get();
  captured_.push_back(std::move(table));
  return FASTCLIP_CUDA_OK;
}

template class TableCache<Table>;
template class TableCache<TargetTable>;

}  // namespace fastclip::cuda
