// All that the page says, in English and Simplified Chinese. {names} are filled in.

export const WORDS = {
  en: {
    tag: "en",
    other: "简体中文",
    title: "Search pictures",
    label: "Words to look for",
    hint: "Describe a picture",
    examples: "Examples",
    results: "Pictures, best first",
    more: "Show more",
    like: "Similar pictures",
    close: "Close",
    private: "Nothing leaves this page: what you type is answered in this tab.",
    browse: "{count} pictures. Type what you are looking for.",
    found: "{count} pictures, best first · {time} in this tab",
    similar: "Similar to “{name}” · {time} in this tab",
    score: "similarity {score}",
    fetch: "Fetching the model: {done} of {total}",
    decode: "Decoding the weights: {share}",
    start: "Starting the model",
    facts: "Model {name}{licence} · {size} fetched, ready in {time}",
    damaged:
      "The model can't start: a file is damaged on its way or on the server ({detail}). Reload the page; if that does not help, write the site again.",
    missing: "The model can't start: {detail} could not be fetched. Check the connection, then reload the page.",
    empty: "The model makes nothing of that text. Type a word.",
    other_failure: "That did not work: {detail}. Reload the page.",
    site: "The page can't read its site.json. Write the site again.",
  },
  zh: {
    tag: "zh-Hans",
    other: "English",
    title: "搜索图片",
    label: "要找的内容",
    hint: "描述一张图片",
    examples: "示例",
    results: "图片，按匹配程度排列",
    more: "显示更多",
    like: "相似图片",
    close: "关闭",
    private: "一切都在本页完成：您输入的内容不会离开这个标签页。",
    browse: "共 {count} 张图片。输入您要找的内容。",
    found: "{count} 张图片，最匹配的在前 · 在本标签页中用时 {time}",
    similar: "与“{name}”相似 · 在本标签页中用时 {time}",
    score: "相似度 {score}",
    fetch: "正在下载模型：{done}，共 {total}",
    decode: "正在解码权重：{share}",
    start: "正在启动模型",
    facts: "模型 {name}{licence} · 下载 {size}，用时 {time} 就绪",
    damaged: "模型无法启动：文件在传输途中或服务器上已损坏（{detail}）。请重新加载页面；如仍不行，请重新生成站点。",
    missing: "模型无法启动：无法下载 {detail}。请检查网络连接，然后重新加载页面。",
    empty: "模型无法理解这段文字。请输入一个词。",
    other_failure: "操作未成功：{detail}。请重新加载页面。",
    site: "页面无法读取 site.json。请重新生成站点。",
  },
};

/** The language to begin with: what was chosen here before, or else the browser's. */
export function firstLanguage() {
  const kept = remembered();
  if (kept in WORDS) return kept;
  return navigator.language.toLowerCase().startsWith("zh") ? "zh" : "en";
}

const remembered = () => {
  try {
    return localStorage.getItem("packlight-language");
  } catch {
    return null; // storage may be forbidden; then the choice lasts as long as the page
  }
};

export function remember(language) {
  try {
    localStorage.setItem("packlight-language", language);
  } catch {
    // as above
  }
}
