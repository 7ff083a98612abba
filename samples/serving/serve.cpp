// Run a steered model through ONNX Runtime's C++ API, with the op library or without it.
//
// serve_cpp MODEL FOLDER [LIBRARY]
#include <onnxruntime_cxx_api.h>

#include <algorithm>
#include <array>
#include <cstdio>
#include <fstream>
#include <stdexcept>
#include <string>
#include <vector>

template <class T>
std::vector<T> read_file(const std::string& path) {
  std::ifstream file(path, std::ios::binary | std::ios::ate);
  if (!file) throw std::runtime_error("cannot read " + path);
  std::vector<T> data(static_cast<size_t>(file.tellg()) / sizeof(T));
  file.seekg(0).read(reinterpret_cast<char*>(data.data()), data.size() * sizeof(T));
  return data;
}

void serve(const char* model, const std::string& folder, const char* library) {
  Ort::Env env(ORT_LOGGING_LEVEL_ERROR, "serve");
  Ort::SessionOptions options;
  if (library) options.RegisterCustomOpsLibrary(library);
  Ort::Session session(env, model, options);

  auto images = read_file<float>(folder + "/images.f32");
  const auto labels = read_file<unsigned char>(folder + "/labels.u8");
  const std::array<int64_t, 4> shape{static_cast<int64_t>(labels.size()), 1, 8, 8};
  const char* names[] = {"image", "beta"};
  const char* logits_name = "logits";
  const auto memory = Ort::MemoryInfo::CreateCpu(OrtDeviceAllocator, OrtMemTypeDefault);
  for (float beta : {1.0f, 0.7f}) {
    std::array<Ort::Value, 2> inputs{
        Ort::Value::CreateTensor<float>(memory, images.data(), images.size(), shape.data(), 4),
        Ort::Value::CreateTensor<float>(memory, &beta, 1, nullptr, 0)};
    const auto outputs =
        session.Run(Ort::RunOptions{}, names, inputs.data(), 2, &logits_name, 1);
    const float* logits = outputs[0].GetTensorData<float>();
    int right = 0;
    for (size_t n = 0; n < labels.size(); ++n) {
      const float* row = logits + 10 * n;
      right += std::max_element(row, row + 10) - row == labels[n];
    }
    std::printf("beta %.2f  accuracy %.4f  first logit %.4f\n", beta,
                static_cast<double>(right) / labels.size(), logits[0]);
  }
}

int main(int argc, char** argv) {
  if (argc < 3 || argc > 4) {
    std::fprintf(stderr, "usage: serve_cpp MODEL FOLDER [LIBRARY]\n");
    return 1;
  }
  try {
    serve(argv[1], argv[2], argc > 3 ? argv[3] : nullptr);
  } catch (const std::exception& error) {
    std::fprintf(stderr, "serve_cpp: %s\n", error.what());
    return 1;
  }
}
