// The regions over a host's rows: tile by tile, through buffers that calls take and give back.
#include "model_regions.hpp"

#include <algorithm>
#include <cstring>
#include <limits>
#include <mutex>

#include "attend_rows.hpp"
#include "errors.hpp"
#include "regions.hpp"
#include "thread_pool.hpp"

namespace specfast {
namespace {

void poison(float* rows, int64_t count, int64_t columns) {
  std::fill_n(rows, count * columns, std::numeric_limits<float>::quiet_NaN());
}

class Regions final : public ModelRegions {
 public:
  explicit Regions(std::shared_ptr<const Model> model) : model_(std::move(model)) {}

  const Model& model() const noexcept override { return *model_; }

  void embed_rows(const int32_t* tokens, int64_t count, float* x) noexcept override {
    for (int64_t m = 0; m < count; m++) {
      float* row = x + m * model_->hidden;
      if (tokens[m] < 0 || tokens[m] >= model_->vocab) {
        poison(row, 1, model_->hidden);
      } else {
        model_->kernels->embed_row(model_->embed, tokens[m], row);
      }
    }
  }

  void qkv_rope_append(int layer, const float* x, int64_t count, int64_t position, KvPages kv,
                       float* q) noexcept override {
    const size_t columns = static_cast<size_t>(model_->q_columns());
    const auto run = [&](Workspace& work) {
      KvCache cache = borrow(kv);
      for_each_tile(count, position, [&](Tile& tile, int64_t first) {
        tile.x = const_cast<float*>(x) + first * model_->hidden;  // read only
        in_team(work, [&](const Team& team) {
          const Pass pass{team, *model_, work, cache, tile};
          rope_angles(pass);
          specfast::qkv_rope_append(pass, layer);
        });
        for (int32_t m = 0; m < tile.M; m++)
          std::copy_n(work.qkv.data() + m * model_->qkv_columns(), columns, q + (first + m) * model_->q_columns());
      });
    };
    if (!holds(kv, position, count) || !with_workspace(run)) poison(q, count, model_->q_columns());
  }

  void attend_rows(int layer, const float* q, int64_t count, int64_t position, KvPages kv,
                   float* out) noexcept override {
    const auto run = [&](Workspace& work) {
      const KvCache cache = borrow(kv);
      for_each_tile(count, position, [&](Tile& tile, int64_t first) {
        const size_t partial = Attention::partial_floats(cache, model_->heads, tile.M, tile.position);
        if (work.partial.size() < partial) work.partial.resize(partial);
        Attention a;
        a.layer = layer;
        a.heads = model_->heads;
        a.M = tile.M;
        a.position = tile.position;
        a.scale = model_->attention_scale();
        a.q = q + first * model_->q_columns();
        a.out = out + first * model_->q_columns();
        a.q_stride = a.out_stride = model_->q_columns();
        a.partial = work.partial.data();
        in_team(work, [&](const Team& team) { specfast::attend_rows(team, *model_->kernels, cache, a); });
      });
    };
    if (!holds(kv, position, count) || !with_workspace(run)) poison(out, count, model_->q_columns());
  }

  void matmul_rows(int layer, Projection projection, const float* rows, const float* x, int64_t count,
                   float* out) noexcept override {
    const LayerWeights& w = model_->layers[static_cast<size_t>(layer)];
    const Matrix& matrix = projection == Projection::o ? w.o : w.down;
    const auto run = [&](Workspace& work) {
      RowsBuffer& buffer = projection == Projection::o ? work.attended : work.activated;
      for_each_tile(count, 0, [&](Tile& tile, int64_t first) {
        tile.x = out + first * model_->hidden;
        if (out != x) std::copy_n(x + first * model_->hidden, tile.M * model_->hidden, tile.x);
        in_team(work, [&](const Team& team) {
          copy_columns(team, rows + first * matrix.K, matrix.K, buffer.view(tile.M).f32, buffer.view(0).stride,
                       matrix.K, tile.M);
          project_rows({team, *model_, work, nothing_, tile}, matrix, buffer);
        });
      });
    };
    if (!with_workspace(run)) poison(out, count, model_->hidden);
  }

  void swiglu_rows(int layer, const float* x, int64_t count, float* out) noexcept override {
    const int32_t columns = model_->intermediate;
    const auto run = [&](Workspace& work) {
      for_each_tile(count, 0, [&](Tile& tile, int64_t first) {
        tile.x = const_cast<float*>(x) + first * model_->hidden;  // read only
        in_team(work, [&](const Team& team) {
          specfast::swiglu_rows({team, *model_, work, nothing_, tile}, layer);
          const Rows rows = work.activated.view(tile.M);
          copy_columns(team, rows.f32, rows.stride, out + first * columns, columns, columns, tile.M);
        });
      });
    };
    if (!with_workspace(run)) poison(out, count, columns);
  }

  void logits_rows(const float* x, int64_t count, float* logits) noexcept override {
    const auto run = [&](Workspace& work) {
      for_each_tile(count, 0, [&](Tile& tile, int64_t first) {
        tile.x = const_cast<float*>(x) + first * model_->hidden;  // read only
        RowMax best[kTileRows];
        in_team(work, [&](const Team& team) {
          specfast::logits_rows({team, *model_, work, nothing_, tile}, 0, model_->vocab, logits + first * model_->vocab,
                                best);
        });
      });
    };
    if (!with_workspace(run)) poison(logits, count, model_->vocab);
  }

  void write_rows(KvPages kv, const float* keys, const float* values, int64_t count,
                  int64_t position) noexcept override {
    if (!holds(kv, position, count)) return;
    try {
      const KvCache cache = borrow(kv);
      const KvShape& shape = cache.shape();
      for (int32_t head = 0; head < shape.kv_heads; head++) {
        for (int64_t i = 0; i < count; i++) {
          const int64_t at = position + i, from = (head * count + i) * shape.head_dim;
          model_->kernels->append_head(cache.page(at / kPagePositions, 0, head), keys + from, values + from,
                                       shape.head_dim, shape.padded_dim(), static_cast<int>(at % kPagePositions));
        }
      }
    } catch (const std::bad_alloc&) {  // the rows stay what they were: zeros
    }
  }

  void read_rows(KvPages kv, int64_t count, void* keys, void* values) noexcept override {
    const size_t bytes = model_->kv_shape().element_bytes() * static_cast<size_t>(count * model_->kv_columns());
    std::memset(keys, 0, bytes);
    std::memset(values, 0, bytes);
    if (!holds(kv, 0, count)) return;
    try {
      borrow(kv).read(0, 0, count, 0, count, keys, values);
    } catch (const std::bad_alloc&) {
    }
  }

  Verdict verify_tokens(Rule rule, const float* p, int32_t V, const float* q, int32_t Vq, const int32_t* tokens,
                        int32_t gamma, const double* u, double lenience) noexcept override {
    const LawLoops& loops = model_->kernels->law;
    if (rule == Rule::block && q) return verify_block(loops, p, V, q, Vq, tokens, gamma, u);
    return specfast::verify_tokens(loops, p, V, q, Vq, tokens, gamma, u, lenience);
  }

 private:
  static bool holds(KvPages kv, int64_t position, int64_t count) {
    return position >= 0 && position <= kv.positions() - count;
  }

  KvCache borrow(KvPages kv) const { return KvCache::over(model_->kv_shape(), kv.data, kv.count); }

  /// Copies this thread's part of the columns, cut as the regions cut them.
  static void copy_columns(const Team& team, const float* from, int64_t from_stride, float* to, int64_t to_stride,
                           int32_t columns, int32_t M) {
    int k0, k1;
    team.part(columns, 64, &k0, &k1);
    for (int32_t m = 0; m < M; m++)
      std::copy(from + m * from_stride + k0, from + m * from_stride + k1, to + m * to_stride + k0);
  }

  template <class Work>
  static void for_each_tile(int64_t count, int64_t position, const Work& work) {
    for (int64_t first = 0; first < count; first += kTileRows) {
      Tile tile;
      tile.M = static_cast<int32_t>(std::min<int64_t>(kTileRows, count - first));
      tile.position = position + first;
      work(tile, first);
    }
  }

  template <class Work>
  void in_team(Workspace& work, const Work& function) const {
    ThreadPool& pool = ThreadPool::instance();
    pool.run(
        model_->is_small() && !pool.size_was_set(), [&](int threads) { work.reserve(*model_, threads); }, function);
  }

  /// False where there was no memory.
  template <class Work>
  bool with_workspace(const Work& function) noexcept {
    try {
      std::unique_ptr<Workspace> work;
      {
        const std::lock_guard<std::mutex> lock(mutex_);
        if (!idle_.empty()) {
          work = std::move(idle_.back());
          idle_.pop_back();
        }
      }
      if (!work) work = std::make_unique<Workspace>(*model_);
      function(*work);
      const std::lock_guard<std::mutex> lock(mutex_);
      idle_.push_back(std::move(work));
      return true;
    } catch (const std::bad_alloc&) {
      return false;
    }
  }

  const std::shared_ptr<const Model> model_;
  std::mutex mutex_;
  std::vector<std::unique_ptr<Workspace>> idle_;
  KvCache nothing_{model_->kv_shape(), {}, 0};  // for regions that touch no keys
};

}  // namespace

std::shared_ptr<ModelRegions> make_model_regions(std::shared_ptr<const Model> model) {
  for (const LayerWeights& layer : model->layers) {
    if (layer.window) throw ShapeError("layers with a sliding window do not run region by region");
  }
  if (model->kv_format != KvFormat::bf16 && model->kv_format != KvFormat::f32)
    throw ShapeError("quantised keys and values do not run region by region");
  return std::make_shared<Regions>(std::move(model));
}

}  // namespace specfast
