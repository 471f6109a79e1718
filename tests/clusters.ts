/** A master and servers that have joined it, or equals of one ledger, for the tests: each a real server on its own root. */
import { join } from "node:path";
import { Remote } from "../client.ts";
import type { ClusterState, MemberStatus } from "../hub.ts";
import {
  type Files,
  ifStill,
  isAlive,
  makeRoot,
  type Server,
  startServer,
  treeOf,
  waitFor,
  writeTree,
} from "./fixtures.ts";

export interface Node {
  readonly name: string;
  readonly root: string;
  server: Server;
  /** What its `status` says. */
  status(): Promise<ClusterState>;
  /** kill -9 of the parent; what is left of it ends by itself. */
  kill(): Promise<void>;
  /** On the same port, with the same options. */
  start(): Promise<void>;
}

export interface Cluster extends AsyncDisposable {
  readonly nodes: Node[];
  readonly master: Node;
  readonly replicas: Node[];
  /** Of the master. */
  readonly address: string;
  /** Waits until clients are sent to all of them. */
  live(count?: number): Promise<void>;
  /** Waits until all trees are the same, and nothing is under way; returns the tree. */
  settled(nodes?: Node[]): Promise<string[]>;
  /** One more, of the given master. */
  add(files?: Files, master?: Node, args?: string[]): Promise<Node>;
}

export interface ClusterOptions {
  /** Besides the master. */
  replicas?: number;
  /** What the master has at the start. */
  files?: Files;
  args?: string[];
  env?: Record<string, string>;
  /** Where the roots are made. */
  parent?: string | undefined;
  /** Of a ledger outside, `etcd://…`: all are equals then, the "master" only the first of them. */
  ledger?: string | undefined;
}

export async function startCluster(options: ClusterOptions = {}): Promise<Cluster> {
  const { replicas = 2, files = {}, args = ["--writable"], env = {}, ledger } = options;
  const folder = makeRoot({}, options.parent);
  const nodes: Node[] = [];
  const add = async (content: Files = {}, master?: Node, more: string[] = []) => {
    const name = String.fromCharCode(65 + nodes.length);
    const root = join(folder.path, name);
    writeTree(root, { "./": "", ...content });
    const above = ledger ? ["--cluster", ledger] : master ? ["--join", master.server.address] : [];
    const node = await startNode(name, root, [...args, ...above, ...more], env);
    nodes.push(node);
    return node;
  };
  const master = await add(files);
  const cluster: Cluster = {
    nodes,
    master,
    get replicas() {
      return nodes.slice(1);
    },
    address: master.server.address,
    add: (content, of = master, more) => add(content, of, more),
    live: async (count = nodes.length - 1) => {
      await waitFor(`${count} are live`, async () => {
        const statuses = await Promise.all((ledger ? nodes : [master]).map((node) => node.status()));
        return statuses.every(({ replicas }) => replicas.filter(({ state }) => state === "live").length === count);
      });
    },
    settled: (some = nodes) => settled(some),
    async [Symbol.asyncDispose]() {
      await Promise.all(nodes.map(({ server }) => server[Symbol.asyncDispose]()));
      folder[Symbol.dispose]();
    },
  };
  for (let count = 0; count < replicas; count++) await cluster.add();
  await cluster.live();
  return cluster;
}

async function startNode(name: string, root: string, args: string[], env: Record<string, string>): Promise<Node> {
  const node: Node = {
    name,
    root,
    server: await startServer(root, { args, env }),
    status: () => statusOf(node.server.address),
    kill: async () => {
      const children = node.server.workers();
      await node.server.stop("SIGKILL");
      await waitFor(`${name} has ended`, () => children.every((pid) => !isAlive(pid)));
    },
    start: async () => {
      node.server = await startServer(root, { args, env, port: node.server.port });
    },
  };
  return node;
}

export async function statusOf(address: string): Promise<ClusterState> {
  const [host, port] = address.split(":");
  const remote = new Remote({ servers: [{ host: host!, port: Number(port) }], direct: true, retries: 0 });
  try {
    return (await remote.status()) as unknown as ClusterState;
  } finally {
    remote.close();
  }
}

/** Equal trees that stay so, and nobody behind. */
async function settled(nodes: Node[]): Promise<string[]> {
  const [first, ...others] = nodes;
  await waitFor("all have the same", async () => {
    const statuses = await Promise.all(nodes.map((node) => node.status().catch(() => undefined)));
    const isBehind = (status: ClusterState | undefined) =>
      status === undefined || status.problem !== undefined || status.replicas.some(isLagging);
    if (statuses.some(isBehind)) return false;
    const tree = ifStill(() => treeOf(first!.root));
    return (
      tree &&
      others.every(({ root }) =>
        Bun.deepEquals(
          ifStill(() => treeOf(root)),
          tree,
        ),
      )
    );
  });
  return treeOf(first!.root);
}

function isLagging({ state, lag }: MemberStatus): boolean {
  return state === "joining" || (state === "live" && lag > 0);
}
