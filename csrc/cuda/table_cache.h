// Tables of what a kernel reads about every span: built when they are new, found again while they stay the
// same.
//
// Host code without CUDA: what it needs of a device comes in through TableMemory.
#pragma once

#include <cstddef>
#include <cstdint>
#include <map>
#include <memory>
#include <optional>
#include <vector>

#include "fastclip_cuda.h"
#include "span_table.h"

namespace fastclip::cuda {

// Of the spans: small ones travel in the kernel arguments.
struct Table {
  struct Source {
    const FastclipCudaSpan* spans;
    int64_t size;
  };

  std::vector<SpanEntry> entries;  // one more than there are spans
  uint32_t num_tiles = 0;
  bool overlapping = false;        // two spans share memory, as the same gradient given twice does
  SpanEntry* on_device = nullptr;  // NULL while the table fits a launch's arguments

  uint32_t num_spans() const { return static_cast<uint32_t>(entries.size()) - 1; }
  static bool fits_arguments(const Source& source) { return source.size + 1 <= kLargeTable; }
  bool matches(const Source& source) const;
  // Fills the host part. Returns a FASTCLIP_CUDA_* status.
  int build(const Source& source);
};

// Of what a step writes: always in device memory, for it stays the same from step to step.
struct TargetTable {
  struct Source {
    const FastclipCudaStepTarget* targets;
    int64_t size;
  };

  std::vector<FastclipCudaStepTarget> entries;
  FastclipCudaStepTarget* on_device = nullptr;

  static bool fits_arguments(const Source&) { return false; }
  bool matches(const Source& source) const;
  int build(const Source& source);
};

// Where a call's kernels go: into a stream, known by its id, or into the graph that is being captured from
// one. A stream has no id while it is captured: cudaStreamGetId then fails and ends the capture.
using StreamId = std::optional<uint64_t>;
inline constexpr StreamId kCaptured = std::nullopt;

class TableMemory {
 public:
  virtual ~TableMemory() = default;
  // Device memory that is never given back. Returns a status.
  virtual int allocate(size_t nbytes, void** memory) = 0;
  // Copies to the device, in stream order.
  virtual int upload(const void* from, size_t nbytes, void* to) = 0;
  // The same, but complete on return and not part of the capture.
  virtual int upload_outside_capture(const void* from, size_t nbytes, void* to) = 0;
};

// Not safe for threads: the caller holds a lock from find() until the kernels are launched.
template <class Table>
class TableCache {
 public:
  // Tables a stream keeps; the one unused for longest makes room.
  static constexpr size_t kTablesPerStream = 4;

  // Returns the table of exactly this source, comparing every pointer, size and dtype.
  //
  // A table in device memory belongs to one stream, so that rewriting it is ordered behind the kernels that
  // read it. A table used in a capture is never changed nor given back, since the graph may be replayed at
  // any time; captures of the same source share it.
  int find(StreamId stream, const typename Table::Source& source, TableMemory& memory, const Table** found);

 private:
  struct Slot {
    Table table;
    void* device_memory = nullptr;
    size_t capacity = 0;  // of the device memory, in bytes
    uint64_t last_use = 0;
  };

  int find_captured(const typename Table::Source& source, TableMemory& memory, const Table** found);

  std::map<StreamId, std::vector<std::unique_ptr<Slot>>> slots_;
  std::vector<std::unique_ptr<Table>> captured_;
  uint64_t clock_ = 0;
};

}  // namespace fastclip::cuda
