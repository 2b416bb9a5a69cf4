// Draws the splats: textures for what stays, one for the posed vertices, one draw call from far to near into a buffer of
// half floats, and a second pass that puts the background behind. 8 bits are blended where half floats are not there.

const TEXELS = 1024;

class Renderer {
  constructor(canvas, scene, shaders) {
    const gl = canvas.getContext("webgl2", { alpha: true, antialias: false, premultipliedAlpha: true });
    if (!gl) throw new Error("no WebGL2");
    this.gl = gl;
    this.canvas = canvas;
    this.count = scene.arrays.splat_face.rows;
    this.half = Boolean(gl.getExtension("EXT_color_buffer_float") || gl.getExtension("EXT_color_buffer_half_float"));
    this.splat = this.program(shaders["splat.vert"], shaders["splat.frag"]);
    this.resolve = this.program(shaders["resolve.vert"], shaders["resolve.frag"]);
    this.loadScene(scene);
    this.orders = gl.createBuffer();
    this.layout = gl.createVertexArray();
    gl.bindVertexArray(this.layout);
    gl.bindBuffer(gl.ARRAY_BUFFER, this.orders);
    gl.bufferData(gl.ARRAY_BUFFER, 4 * this.count, gl.DYNAMIC_DRAW);
    const place = gl.getAttribLocation(this.splat.program, "splat");
    gl.enableVertexAttribArray(place);
    gl.vertexAttribIPointer(place, 1, gl.UNSIGNED_INT, 0, 0);
    gl.vertexAttribDivisor(place, 1);
    this.empty = gl.createVertexArray();
    this.target = { width: 0, height: 0, texture: null, frame: gl.createFramebuffer() };
    this.ordered = false;
  }

  program(vertex, fragment) {
    const gl = this.gl;
    const program = gl.createProgram();
    for (const [type, source] of [[gl.VERTEX_SHADER, vertex], [gl.FRAGMENT_SHADER, fragment]]) {
      const shader = gl.createShader(type);
      gl.shaderSource(shader, source);
      gl.compileShader(shader);
      if (!gl.getShaderParameter(shader, gl.COMPILE_STATUS) && !gl.isContextLost())
        throw new Error(gl.getShaderInfoLog(shader));
      gl.attachShader(program, shader);
    }
    gl.linkProgram(program);
    if (!gl.getProgramParameter(program, gl.LINK_STATUS) && !gl.isContextLost())
      throw new Error(gl.getProgramInfoLog(program));
    const places = new Map();
    const at = (name) => {
      if (!places.has(name)) places.set(name, gl.getUniformLocation(program, name));
      return places.get(name);
    };
    return { program, at };
  }

  // A texture of `data`, `parts` numbers a texel, TEXELS wide.
  texture(data, parts, internal, format, type) {
    const gl = this.gl;
    const height = Math.ceil(data.length / parts / TEXELS);
    const whole = new data.constructor(TEXELS * height * parts);
    whole.set(data);
    const texture = gl.createTexture();
    gl.bindTexture(gl.TEXTURE_2D, texture);
    gl.texParameteri(gl.TEXTURE_2D, gl.TEXTURE_MIN_FILTER, gl.NEAREST);
    gl.texParameteri(gl.TEXTURE_2D, gl.TEXTURE_MAG_FILTER, gl.NEAREST);
    gl.texImage2D(gl.TEXTURE_2D, 0, internal, TEXELS, height, 0, format, type, whole);
    return { texture, height, whole };
  }

  loadScene({ arrays }) {
    const gl = this.gl;
    const n = this.count;
    const words = new Uint32Array(4 * n), colors = new Uint8Array(4 * n), ends = new Uint16Array(4 * arrays.faces.rows);
    const { splat_means: m, splat_face: f, splat_quats: q, splat_log_scales: s, splat_shares: c } = arrays;
    for (let i = 0; i < n; i++) {
      words[4 * i] = m.codes[3 * i] | (m.codes[3 * i + 1] << 16);
      words[4 * i + 1] = m.codes[3 * i + 2] | (f.codes[i] << 16);
      words[4 * i + 2] = q.codes[4 * i] | (q.codes[4 * i + 1] << 8) | (q.codes[4 * i + 2] << 16) | (q.codes[4 * i + 3] << 24);
      words[4 * i + 3] = s.codes[3 * i] | (s.codes[3 * i + 1] << 8) | (s.codes[3 * i + 2] << 16) | (c.codes[4 * i + 3] << 24);
      for (let k = 0; k < 3; k++) colors[4 * i + k] = c.codes[4 * i + k];
    }
    for (let i = 0; i < arrays.faces.rows; i++)
      for (let k = 0; k < 3; k++) ends[4 * i + k] = arrays.faces.codes[3 * i + k];
    this.splats = this.texture(words, 4, gl.RGBA32UI, gl.RGBA_INTEGER, gl.UNSIGNED_INT);
    this.colors = this.texture(colors, 4, gl.RGBA8UI, gl.RGBA_INTEGER, gl.UNSIGNED_BYTE);
    this.faces = this.texture(ends, 4, gl.RGBA16UI, gl.RGBA_INTEGER, gl.UNSIGNED_SHORT);
    this.vertices = this.texture(new Float32Array(arrays.neutral.values), 3, gl.RGB32F, gl.RGB, gl.FLOAT);
    gl.useProgram(this.splat.program);
    this.loadHarmonics(arrays.splat_harmonics);
    const ranges = { mean: [m, 3], scale: [s, 3], quat: [q, 4], share: [c, 4] };
    for (const [name, [array, parts]] of Object.entries(ranges))
      for (const end of ["low", "step"]) {
        const at = this.splat.at(name + end[0].toUpperCase() + end.slice(1));
        gl[`uniform${parts}fv`](at, array[end]);
      }
    ["vertices", "faces", "splats", "colors", "harmonics"].forEach((name, unit) => gl.uniform1i(this.splat.at(name), unit));
  }

  // View-dependent colour: a texel for each coefficient from degree 1 on, splat after splat; none is one empty texel.
  loadHarmonics(array) {
    const gl = this.gl, count = array ? array.width / 3 : 0, n = count * this.count;
    const codes = new Uint8Array(4 * Math.max(n, 1));
    for (let i = 0; i < n; i++) for (let k = 0; k < 3; k++) codes[4 * i + k] = array.codes[3 * i + k];
    this.harmonics = this.texture(codes, 4, gl.RGBA8UI, gl.RGBA_INTEGER, gl.UNSIGNED_BYTE);
    gl.uniform1i(this.splat.at("harmonicCount"), count);
    if (!count) return;
    gl.uniform3fv(this.splat.at("harmonicLow"), array.low);
    gl.uniform3fv(this.splat.at("harmonicStep"), array.step);
  }

  pose(vertices) {
    const gl = this.gl;
    this.vertices.whole.set(vertices);
    gl.bindTexture(gl.TEXTURE_2D, this.vertices.texture);
    gl.texSubImage2D(gl.TEXTURE_2D, 0, 0, 0, TEXELS, this.vertices.height, gl.RGB, gl.FLOAT, this.vertices.whole);
  }

  order(order) {
    const gl = this.gl;
    gl.bindBuffer(gl.ARRAY_BUFFER, this.orders);
    gl.bufferSubData(gl.ARRAY_BUFFER, 0, order);
    this.ordered = true;
  }

  resize(width, height) {
    const gl = this.gl, target = this.target;
    if (target.width === width && target.height === height) return;
    gl.deleteTexture(target.texture);
    target.texture = gl.createTexture();
    gl.bindTexture(gl.TEXTURE_2D, target.texture);
    const [internal, type] = this.half ? [gl.RGBA16F, gl.HALF_FLOAT] : [gl.RGBA8, gl.UNSIGNED_BYTE];
    gl.texImage2D(gl.TEXTURE_2D, 0, internal, width, height, 0, gl.RGBA, type, null);
    for (const end of [gl.TEXTURE_MIN_FILTER, gl.TEXTURE_MAG_FILTER]) gl.texParameteri(gl.TEXTURE_2D, end, gl.LINEAR);
    for (const side of [gl.TEXTURE_WRAP_S, gl.TEXTURE_WRAP_T]) gl.texParameteri(gl.TEXTURE_2D, side, gl.CLAMP_TO_EDGE);
    gl.bindFramebuffer(gl.FRAMEBUFFER, target.frame);
    gl.framebufferTexture2D(gl.FRAMEBUFFER, gl.COLOR_ATTACHMENT0, gl.TEXTURE_2D, target.texture, 0);
    Object.assign(target, { width, height });
  }

  // `view` is a 3×4 matrix, `lens` for an image of width × height; `background` is premultiplied, RGBA. The canvas may
  // be larger than the image, which is then scaled up. `frame` is where the image fades out, if anywhere.
  draw({ view, lens, width, height, normals, background, frame = [0, 0, 0, 0] }) {
    const gl = this.gl;
    this.resize(width, height);
    gl.bindFramebuffer(gl.FRAMEBUFFER, this.target.frame);
    gl.viewport(0, 0, width, height);
    gl.clearColor(0, 0, 0, 0);
    gl.clear(gl.COLOR_BUFFER_BIT);
    if (this.ordered) this.drawSplats(view, lens, width, height, normals);
    gl.bindFramebuffer(gl.FRAMEBUFFER, null);
    gl.viewport(0, 0, this.canvas.width, this.canvas.height);
    gl.disable(gl.BLEND);
    gl.useProgram(this.resolve.program);
    gl.bindVertexArray(this.empty);
    gl.activeTexture(gl.TEXTURE0);
    gl.bindTexture(gl.TEXTURE_2D, this.target.texture);
    gl.uniform4fv(this.resolve.at("background"), normals ? [0.5, 0.5, 0.5, 1] : background);
    gl.uniform2f(this.resolve.at("size"), this.canvas.width, this.canvas.height);
    gl.uniform4fv(this.resolve.at("frame"), frame);
    gl.drawArrays(gl.TRIANGLES, 0, 3);
  }

  drawSplats(view, lens, width, height, normals) {
    const gl = this.gl, at = this.splat.at;
    gl.useProgram(this.splat.program);
    gl.bindVertexArray(this.layout);
    [this.vertices, this.faces, this.splats, this.colors, this.harmonics].forEach(({ texture }, unit) => {
      gl.activeTexture(gl.TEXTURE0 + unit);
      gl.bindTexture(gl.TEXTURE_2D, texture);
    });
    const rows = [0, 1, 2].map((i) => [view[4 * i], view[4 * i + 1], view[4 * i + 2]]);
    gl.uniformMatrix3fv(at("turn"), true, rows.flat());
    gl.uniform3f(at("shift"), view[3], view[7], view[11]);
    gl.uniform3fv(at("eye"), eyeOf(view));
    gl.uniform4fv(at("lens"), lens);
    gl.uniform2f(at("size"), width, height);
    gl.uniform1i(at("normals"), normals ? 1 : 0);
    gl.enable(gl.BLEND);
    gl.blendFunc(gl.ONE, gl.ONE_MINUS_SRC_ALPHA);
    gl.drawArraysInstanced(gl.TRIANGLE_STRIP, 0, 4, this.count);
  }
}
