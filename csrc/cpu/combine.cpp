#include "combine.h"

#include <cmath>

namespace fastclip::cpu {

NormType::NormType(double p) : p(p) {
  kind = p == 2.0        ? NormKind::kTwo
         : p == 1.0      ? NormKind::kOne
         : std::isinf(p) ? NormKind::kInf
                         : NormKind::kAny;
}

namespace {

Accumulator max_of(const Accumulator* parts, size_t count) {
  Accumulator total;
  for (size_t i = 0; i < count; ++i) {
    // The negated comparison lets a nan in, and keeps it.
    if (!(parts[i].sum <= total.sum)) total.sum = parts[i].sum;
    if (std::isnan(total.sum)) break;
  }
  return total;
}

// For parts of which some are scaled or not finite.
Accumulator sum_of_scaled(const Accumulator* parts, size_t count, double p) {
  Accumulator total;
  bool any = false;
  double nonfinite = 0;
  for (size_t i = 0; i < count; ++i) {
    if (!std::isfinite(parts[i].sum)) nonfinite += parts[i].sum;  // nan wins over inf, wherever it is
    if (parts[i].sum == 0) continue;
    if (!any || parts[i].exponent > total.exponent) total.exponent = parts[i].exponent;
    any = true;
  }
  if (nonfinite != 0) return {nonfinite, 0};
  for (size_t i = 0; i < count; ++i) {
    const int64_t shift = parts[i].exponent - total.exponent;
    total.sum += shift == 0 ? parts[i].sum : parts[i].sum * std::exp2(static_cast<double>(shift) * p);
  }
  return total;
}

}  // namespace

Accumulator combine(const Accumulator* parts, size_t count, NormType type) {
  if (type.kind == NormKind::kInf) return max_of(parts, count);
  double sum = 0;
  bool any_scaled = false;
  for (size_t i = 0; i < count; ++i) {
    sum += parts[i].sum;
    any_scaled |= parts[i].exponent != 0;
  }
  if (any_scaled || !std::isfinite(sum)) return sum_of_scaled(parts, count, type.p);
  return {sum, 0};
}

double norm_of(const Accumulator& total, NormType type) {
  switch (type.kind) {
    case NormKind::kInf:
      return total.sum;
    case NormKind::kOne:
      return std::ldexp(total.sum, static_cast<int>(total.exponent));
    case NormKind::kTwo:
      return std::ldexp(std::sqrt(total.sum), static_cast<int>(total.exponent));
    default:
      return std::ldexp(std::pow(total.sum, 1.0 / type.p), static_cast<int>(total.exponent));
  }
}

}  // namespace fastclip::cpu
