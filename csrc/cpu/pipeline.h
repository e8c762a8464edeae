// accumulate -> combine -> finalize -> apply, over a list of spans.
//
// Every function may run without the GIL, on up to num_threads threads (fewer for small lists), and gives the
// same bits for any number of them.
#pragma once

#include <vector>

#include "../elementwise.h"
#include "../span.h"
#include "combine.h"

namespace fastclip::cpu {

// The p-norm of all elements together. Reads every byte once.
double total_norm(const std::vector<Span>& spans, NormType type, int num_threads);

// The p-norm of each span. Reads every byte once.
std::vector<double> norms(const std::vector<Span>& spans, NormType type, int num_threads);

struct Clipped {
  double total_norm;
  double coef;  // what the spans were multiplied by; 1 if nothing was written
};

// Multiplies every span by min(1, max_norm / (norm + 1e-6)); reads every byte once, and reads and writes it
// once more if the coefficient is not 1. With `keep_nonfinite`, a norm that is not finite (in the precision
// that `single_precision` names) leaves everything as it is.
Clipped clip_norm(const std::vector<Span>& spans, NormType type, double max_norm, bool keep_nonfinite,
                  bool single_precision, int num_threads);

// Multiplies every span by coef; spans for which that changes nothing are not touched.
void scale(const std::vector<Span>& spans, double coef, int num_threads);

// Multiplies spans[i] by coefs[i]; a span for which that changes nothing is not touched.
void scale_each(const std::vector<Span>& spans, const std::vector<double>& coefs, int num_threads);

// Changes every element. Returns, per span, whether one is another now.
std::vector<char> elementwise(const std::vector<Span>& spans, Elementwise operation, double value,
                              int num_threads);

// How many elements of each span are nan and how many infinite. Reads every byte once.
std::vector<NonfiniteCount> count_nonfinite(const std::vector<Span>& spans, int num_threads);

}  // namespace fastclip::cpu
