// Runs one launch in a process of its own, for the sanitizers. Usage: runner JOB
// JOB is text: kernel NAME | threadgroups X Y Z | threads X Y Z | schedule N | buffer INDEX BYTES PATH, each on its
// line. Buffers are read from their files, and written back after a launch without an error.
#include "runtime.h"

#include <cstdio>
#include <cstdlib>
#include <cstring>

int main(int, char** arguments) {
  emulator::Launch launch{};
  char kernel[512] = "", word[32], paths[emulator::max_buffers][512];
  std::FILE* job = std::fopen(arguments[1], "r");
  while (job && std::fscanf(job, "%31s", word) == 1) {
    int read = 0;
    if (!std::strcmp(word, "kernel"))
      read = std::fscanf(job, "%511s", kernel);
    else if (!std::strcmp(word, "schedule"))
      read = std::fscanf(job, "%lu", &launch.schedule);
    else if (!std::strcmp(word, "buffer")) {
      unsigned i;
      std::size_t bytes;
      char path[512];
      read = std::fscanf(job, "%u %zu %511s", &i, &bytes, path);
      std::strcpy(paths[i], path);
      launch.buffer_bytes[i] = bytes;
      launch.buffers[i] = std::malloc(bytes);  // its exact size: what lies behind belongs to nobody
      std::FILE* file = std::fopen(path, "rb");
      if (!file || std::fread(launch.buffers[i], 1, bytes, file) != bytes) return std::perror(path), 2;
      std::fclose(file);
    } else {
      unsigned* three = !std::strcmp(word, "threads") ? launch.threadgroup_size : launch.threadgroups;
      read = std::fscanf(job, "%u %u %u", three, three + 1, three + 2);
    }
    if (read <= 0) return 2;
  }
  emulator::Counters counters;
  char message[2048];
  if (emulator::emulator_run(kernel, &launch, &counters, message, sizeof message))
    return std::fprintf(stderr, "%s\n", message), 3;
  for (unsigned i = 0; i < emulator::max_buffers; i++) {
    if (!launch.buffers[i]) continue;
    std::FILE* file = std::fopen(paths[i], "wb");
    if (!file || std::fwrite(launch.buffers[i], 1, launch.buffer_bytes[i], file) != launch.buffer_bytes[i])
      return std::perror(paths[i]), 2;
    std::fclose(file);
  }
  std::printf("%lu %lu %lu\n", counters.collectives, counters.barriers, counters.threadgroup_bytes);
  return 0;
}
