// The C interface of libfastclip_cuda: lists of spans in, results in device memory.
//
// Nothing here waits for the device. Every function returns 0, a positive cudaError_t or a negative
// FASTCLIP_CUDA_* status; fastclip_cuda_message() puts each into words.
#ifndef FASTCLIP_CUDA_H_
#define FASTCLIP_CUDA_H_

#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif

#define FASTCLIP_CUDA_ABI_VERSION 5

#if defined(__GNUC__)
#define FASTCLIP_CUDA_API __attribute__((visibility("default")))
#else
#define FASTCLIP_CUDA_API
#endif

enum {
  FASTCLIP_CUDA_OK = 0,
  FASTCLIP_CUDA_TOO_LARGE = -1,      // more than 2^32 - 1 tiles of 16 KiB
  FASTCLIP_CUDA_BAD_DTYPE = -2,      // a tag that is not one of FASTCLIP_CUDA_FLOAT32 ..
  FASTCLIP_CUDA_MISALIGNED = -3,     // a pointer that is not a multiple of its element size
  FASTCLIP_CUDA_BAD_NORM_TYPE = -4,  // not p > 0 or inf
  FASTCLIP_CUDA_NO_MEMORY = -5,      // the host is out of memory
  FASTCLIP_CUDA_NO_OPERATION = -6    // not a name in ../elementwise.h
};

enum {
  FASTCLIP_CUDA_FLOAT32 = 0,
  FASTCLIP_CUDA_FLOAT64 = 1,
  FASTCLIP_CUDA_BFLOAT16 = 2,
  FASTCLIP_CUDA_FLOAT16 = 3
};

// One tensor's dense memory. An empty one may have any pointer.
typedef struct {
  void* data;
  int64_t numel;
  uint8_t dtype;
} FastclipCudaSpan;

// What every operation needs. The spans are read before the call returns; their memory and the workspace
// must stay allocated until the stream has done the work, as with any kernel launch.
typedef struct {
  const FastclipCudaSpan* spans;
  int64_t num_spans;
  int device;
  void* stream;     // cudaStream_t, on `device`; may be capturing a graph
  void* workspace;  // device memory of fastclip_cuda_workspace_bytes(), 16-byte aligned, contents free
} FastclipCudaCall;

// What an optimizer's step writes beside one gradient: dense memory in the order of the gradient. The
// parameter has the gradient's dtype; the state has it, too, or is float32 where that has 16 bits.
typedef struct {
  void* param;
  void* state[3];  // Adam: exp_avg, exp_avg_sq, and max_exp_avg_sq or NULL; SGD: momentum_buffer or NULL
  void* step;      // the counter, one float32 or float64, that Adam counts up; NULL for SGD
  uint32_t rule;   // index into the call's rules; in the order of the spans
  uint8_t state_dtype;
  uint8_t step_dtype;
} FastclipCudaStepTarget;

// How torch.optim.Adam and AdamW update.
typedef struct {
  const void* lr_on_device;  // in the place of `lr`: one float32 or float64; NULL: `lr` counts
  double lr;
  double beta1;
  double beta2;
  double eps;
  double weight_decay;
  uint8_t lr_dtype;
  uint8_t decoupled;
  uint8_t maximize;
} FastclipCudaAdamRule;

// How torch.optim.SGD updates.
typedef struct {
  const void* lr_on_device;
  double lr;
  double momentum;
  double grad_share;  // of the gradient in the momentum: 1 - dampening, or 1 in a buffer's first step
  double weight_decay;
  uint8_t lr_dtype;
  uint8_t nesterov;
  uint8_t maximize;
} FastclipCudaSgdRule;

// How a step clips, and where it says what happened; pointers are on the device.
typedef struct {
  double norm_type;  // p > 0 or inf
  double max_norm;
  const double* max_norm_on_device;  // in the place of `max_norm`; NULL: `max_norm` counts
  // What to multiply the gradients by, one for all or one per span, where the caller knows it. Nothing is
  // measured then, and total_norm, clip_coef and skipped are read, not written. NULL: it follows from the
  // norm.
  const double* given_coefs;
  uint8_t given_per_span;
  double max_value;         // bound of each element's magnitude, after all that; inf: none
  const float* grad_scale;  // the gradients are this many times too large; NULL: they are not
  const float* found_inf;   // not 0 skips the step; NULL: nothing does
  uint8_t skip_nonfinite;   // a norm that is nan or inf skips the step
  uint8_t write_grads;      // leave the clipped gradients behind, which then must not share memory
  uint8_t norm_dtype;       // of total_norm and clip_coef: float32 or float64
  void* total_norm;         // of the gradients divided by the scale
  void* clip_coef;
  uint8_t* skipped;  // 0 or 1
  double* counts;    // of steps clipped, skipped, all, skipped in a row; the largest finite norm. Or NULL
} FastclipCudaStepOptions;

FASTCLIP_CUDA_API int fastclip_cuda_abi_version(void);
// A static string; never NULL.
FASTCLIP_CUDA_API const char* fastclip_cuda_message(int status);
// 0 if the kernels can run on the device: driver new enough, architecture compiled in.
FASTCLIP_CUDA_API int fastclip_cuda_probe(int device);
FASTCLIP_CUDA_API int fastclip_cuda_workspace_bytes(int device, int64_t num_spans, int64_t* nbytes);

// The p-norm of all elements together (norm_type: p > 0 or inf), as float32 or float64 as `norm_dtype`
// says, and the coefficient min(1, max_norm / (norm + 1e-6)). One launch; every byte is read once. Here and
// below, *max_norm_on_device takes the place of `max_norm` unless it is NULL.
FASTCLIP_CUDA_API int fastclip_cuda_total_norm(const FastclipCudaCall* call, double norm_type,
                                               double max_norm, const double* max_norm_on_device,
                                               int norm_dtype, void* total_norm, double* coefficient);
// total_norm, then scale by the coefficient. Two launches; one if max_norm is the number inf.
FASTCLIP_CUDA_API int fastclip_cuda_clip_grad_norm(const FastclipCudaCall* call, double norm_type,
                                                   double max_norm, const double* max_norm_on_device,
                                                   int norm_dtype, void* total_norm);
// Multiplies every span by *coefficients or, with `per_span`, spans[i] by coefficients[i]. One launch, which
// writes nothing where the coefficient is 1.
FASTCLIP_CUDA_API int fastclip_cuda_scale(const FastclipCudaCall* call, const double* coefficients,
                                          int per_span);
// Multiplies every span by min(1, max_norm / (*total_norm + 1e-6)). One launch, likewise.
FASTCLIP_CUDA_API int fastclip_cuda_clip_grads_with_norm(const FastclipCudaCall* call, double max_norm,
                                                         const double* max_norm_on_device, int norm_dtype,
                                                         const void* total_norm);
// The p-norm of each span: num_spans values of `norm_dtype`. Two launches.
FASTCLIP_CUDA_API int fastclip_cuda_norms(const FastclipCudaCall* call, double norm_type, int norm_dtype,
                                          void* norms);
// How many elements of each span are nan and how many infinite: num_spans pairs. Two launches.
FASTCLIP_CUDA_API int fastclip_cuda_count_nonfinite(const FastclipCudaCall* call, int64_t* counts);
// Applies an operation of ../elementwise.h to every element; value is not nan, and *value_on_device, unless
// it is NULL, takes its place. One launch, which writes 16-byte words with an element that changed only.
FASTCLIP_CUDA_API int fastclip_cuda_elementwise(const FastclipCudaCall* call, const char* name, double value,
                                                const double* value_on_device);

// Clip and step in one: three launches, which read the spans, the gradients, once and then move what the
// update moves. targets[i] belongs to spans[i]; no two of their tensors share memory. A step that is skipped
// changes nothing. The workspace has fastclip_cuda_step_workspace_bytes(). More than 512 rules take a launch
// more for every 512.
FASTCLIP_CUDA_API int fastclip_cuda_step_workspace_bytes(int device, int64_t num_spans, int64_t* nbytes);
FASTCLIP_CUDA_API int fastclip_cuda_adam_step(const FastclipCudaCall* call,
                                              const FastclipCudaStepTarget* targets,
                                              const FastclipCudaAdamRule* rules, int64_t num_rules,
                                              const FastclipCudaStepOptions* options);
FASTCLIP_CUDA_API int fastclip_cuda_sgd_step(const FastclipCudaCall* call,
                                             const FastclipCudaStepTarget* targets,
                                             const FastclipCudaSgdRule* rules, int64_t num_rules,
                                             const FastclipCudaStepOptions* options);

#ifdef __cplusplus
}
#endif

#endif  // FASTCLIP_CUDA_H_
