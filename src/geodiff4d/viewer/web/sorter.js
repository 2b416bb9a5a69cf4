// The page's end of the sorting worker: one request under way, the latest one waiting.

class Sorter {
  constructor(source, scene) {
    const value = (name) => scene.arrays[name].values;
    this.worker = new Worker(URL.createObjectURL(new Blob([source], { type: "text/javascript" })));
    this.worker.postMessage({ faces: value("faces"), face: value("splat_face"), means: value("splat_means") });
    this.worker.onmessage = ({ data }) => this.arrived(data);
    this.spare = new Uint32Array(scene.arrays.splat_face.rows);
    this.copy = new Float32Array(scene.arrays.neutral.values.length);
    this.waiting = null;
    this.number = 0;
    this.ms = 0;
    this.onorder = () => {};
  }

  // Asks for the order of a posed head seen by a camera; returns the number of the request.
  ask(vertices, view) {
    this.number++;
    const request = { vertices, toward: [view[8], view[9], view[10], view[11]], number: this.number };
    if (this.spare === null) this.waiting = request;
    else this.send(request);
    return this.number;
  }

  send(request) {
    this.copy.set(request.vertices);
    const { spare: order, copy: vertices } = this;
    this.spare = this.copy = null;
    this.worker.postMessage({ ...request, vertices, order }, [order.buffer, vertices.buffer]);
  }

  arrived({ order, vertices, ms, number }) {
    this.ms = ms;
    this.onorder(order, number);
    // The renderer has copied the order to the GPU: both arrays go back with the next request.
    this.spare = order;
    this.copy = vertices;
    const next = this.waiting;
    this.waiting = null;
    if (next) this.send(next);
  }
}
