// Run a steered model through ONNX Runtime's C API, with the op library or without it.
//
// serve_c MODEL FOLDER [LIBRARY]
#include <onnxruntime_c_api.h>
#include <stdio.h>
#include <stdlib.h>

enum { kMost = 4096, kPixels = 64, kClasses = 10 };  // images at most, and of each

static const OrtApi* ort;

static void check(OrtStatus* status) {
  if (status == NULL) return;
  fprintf(stderr, "serve_c: %s\n", ort->GetErrorMessage(status));
  exit(1);
}

static int64_t read_file(const char* folder, const char* name, void* data, size_t size) {
  char path[4096];
  snprintf(path, sizeof path, "%s/%s", folder, name);
  FILE* file = fopen(path, "rb");
  if (file == NULL) {
    fprintf(stderr, "serve_c: cannot read %s\n", path);
    exit(1);
  }
  size_t count = fread(data, size, kMost, file);
  fclose(file);
  return (int64_t)count;
}

int main(int argc, char** argv) {
  if (argc < 3 || argc > 4) {
    fprintf(stderr, "usage: serve_c MODEL FOLDER [LIBRARY]\n");
    return 1;
  }
  ort = OrtGetApiBase()->GetApi(ORT_API_VERSION);
  if (ort == NULL) {
    fprintf(stderr, "serve_c: this ONNX Runtime is older than the headers\n");
    return 1;
  }
  OrtEnv* env;
  OrtSessionOptions* options;
  OrtSession* session;
  check(ort->CreateEnv(ORT_LOGGING_LEVEL_ERROR, "serve", &env));
  check(ort->CreateSessionOptions(&options));
  if (argc > 3) check(ort->RegisterCustomOpsLibrary_V2(options, argv[3]));
  check(ort->CreateSession(env, argv[1], options, &session));

  static float images[kMost][kPixels];
  static unsigned char labels[kMost];
  int64_t count = read_file(argv[2], "images.f32", images, sizeof *images);
  read_file(argv[2], "labels.u8", labels, sizeof *labels);

  OrtMemoryInfo* memory;
  check(ort->CreateCpuMemoryInfo(OrtDeviceAllocator, OrtMemTypeDefault, &memory));
  const float betas[] = {1.0f, 0.7f};
  for (int i = 0; i < 2; ++i) {
    float beta = betas[i];
    const int64_t shape[] = {count, 1, 8, 8};
    const ONNXTensorElementDataType type = ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT;
    OrtValue *inputs[2], *output = NULL;
    check(ort->CreateTensorWithDataAsOrtValue(memory, images, count * sizeof *images,
                                              shape, 4, type, &inputs[0]));
    check(ort->CreateTensorWithDataAsOrtValue(memory, &beta, sizeof beta, NULL, 0, type,
                                              &inputs[1]));
    const char* names[] = {"image", "beta"};
    const char* logits_name = "logits";
    check(ort->Run(session, NULL, names, (const OrtValue* const*)inputs, 2, &logits_name, 1,
                   &output));
    float* logits;
    check(ort->GetTensorMutableData(output, (void**)&logits));
    int right = 0;
    for (int64_t n = 0; n < count; ++n) {
      const float* row = logits + n * kClasses;
      int best = 0;
      for (int k = 1; k < kClasses; ++k) best = row[k] > row[best] ? k : best;
      right += best == labels[n];
    }
    printf("beta %.2f  accuracy %.4f  first logit %.4f\n", beta, (double)right / count, logits[0]);
    ort->ReleaseValue(output);
    ort->ReleaseValue(inputs[1]);
    ort->ReleaseValue(inputs[0]);
  }
  ort->ReleaseMemoryInfo(memory);
  ort->ReleaseSession(session);
  ort->ReleaseSessionOptions(options);
  ort->ReleaseEnv(env);
  return 0;
}
