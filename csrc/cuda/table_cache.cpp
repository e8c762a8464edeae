#include "table_cache.h"

#include <algorithm>
#include <cstdint>
#include <limits>

namespace fastclip::cuda {
namespace {

// Device memory grows in powers of two from here, so that growing lists leave little behind.
constexpr size_t kMinCapacity = 4096;

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

}  // namespace

bool Table::matches(const FastclipCudaSpan* spans, int64_t num_spans) const {
  if (static_cast<int64_t>(entries.size()) != num_spans + 1) return false;
  for (int64_t i = 0; i < num_spans; ++i) {
    const SpanEntry& entry = entries[i];
    if (entry.data != spans[i].data || entry.numel != spans[i].numel ||
        static_cast<uint8_t>(entry.dtype) != spans[i].dtype) {
      return false;
    }
  }
  return true;
}

int Table::build(const FastclipCudaSpan* spans, int64_t num_spans) {
  entries.clear();
  entries.reserve(num_spans + 1);
  uint64_t tiles = 0;
  for (int64_t i = 0; i < num_spans; ++i) {
    if (spans[i].dtype >= kNumDTypes) return FASTCLIP_CUDA_BAD_DTYPE;
    const auto dtype = static_cast<DType>(spans[i].dtype);
    const bool aligned = reinterpret_cast<uintptr_t>(spans[i].data) % item_size(dtype) == 0;
    if (spans[i].numel > 0 && !aligned) return FASTCLIP_CUDA_MISALIGNED;
    entries.push_back({spans[i].data, spans[i].numel, static_cast<uint32_t>(tiles), dtype});
    const int64_t elements_per_tile = kTileBytes / item_size(dtype);
    tiles += static_cast<uint64_t>((spans[i].numel + elements_per_tile - 1) / elements_per_tile);
    if (tiles > std::numeric_limits<uint32_t>::max()) return FASTCLIP_CUDA_TOO_LARGE;
  }
  num_tiles = static_cast<uint32_t>(tiles);
  overlapping = overlap(entries);
  entries.push_back({nullptr, 0, num_tiles, DType::kFloat32});
  return FASTCLIP_CUDA_OK;
}

int TableCache::find(StreamKey key, const FastclipCudaSpan* spans, int64_t num_spans, TableMemory& memory,
                     const Table** found) {
  if (key.capture != 0 && num_spans + 1 > kLargeTable) return find_captured(spans, num_spans, memory, found);

  auto& slots = slots_[key.stream];
  Slot* oldest = nullptr;
  for (auto& slot : slots) {
    if (slot->table.matches(spans, num_spans)) {
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
  table.on_device = nullptr;
  int status = table.build(spans, num_spans);
  if (status == FASTCLIP_CUDA_OK && !table.fits_arguments()) {
    if (oldest->capacity < table.entries.size()) {
      size_t capacity = kMinCapacity;
      while (capacity < table.entries.size()) capacity *= 2;
      status = memory.allocate(capacity, &oldest->device_memory);
      oldest->capacity = status == FASTCLIP_CUDA_OK ? capacity : 0;
    }
    table.on_device = oldest->device_memory;
    if (status == FASTCLIP_CUDA_OK) status = memory.upload(table);
  }
  if (status != FASTCLIP_CUDA_OK) {
    table.entries.clear();  // matches nothing
    return status;
  }
  oldest->last_use = ++clock_;
  *found = &table;
  return FASTCLIP_CUDA_OK;
}

int TableCache::find_captured(const FastclipCudaSpan* spans, int64_t num_spans, TableMemory& memory,
                              const Table** found) {
  for (const auto& table : captured_) {
    if (table->matches(spans, num_spans)) {
      *found = table.get();
      return FASTCLIP_CUDA_OK;
    }
  }
  auto table = std::make_unique<Table>();
  int status = table->build(spans, num_spans);
  if (status == FASTCLIP_CUDA_OK) status = memory.allocate(table->entries.size(), &table->on_device);
  if (status == FASTCLIP_CUDA_OK) status = memory.upload_outside_capture(*table);
  if (status != FASTCLIP_CUDA_OK) return status;
  *found = table.get();
  captured_.push_back(std::move(table));
  return FASTCLIP_CUDA_OK;
}

}  // namespace fastclip::cuda
