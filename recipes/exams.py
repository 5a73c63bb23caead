"""
What tools/evaluate.py measures by likelihood: minimal pairs, and the exams C-Eval and CMMLU (four answers to a question, one
right), whose questions are asked as lm-eval (version 0.4) asks them.

    minimal_pairs(model, tokenizer, cfg, env)     {measure: hits and misses} of cfg.input
    exam(model, tokenizer, cfg, env)              the same of the exam cfg.what
    questions("ceval", "data/ceval", shots=5)     {subject: [Question]}

in: the csv files of the exam, C-Eval: dev/<subject>_dev.csv, val/<subject>_val.csv; CMMLU: dev/<subject>.csv,
    test/<subject>.csv. Examples ("shots") are the first ones of dev; the questions are those of val or test.
"""
import glob
import os
import sys
from dataclasses import dataclass

import torch
from tqdm import tqdm

from common.data import pad
from common.loss import answer_logps
from configurator import check
from readers.records import records_of

LETTERS = "ABCD"


@torch.no_grad()
def logps_of(model, documents, pad_id, env):
    """Log-prob and number of the learned tokens of each document (ids, mask): two tensors (R)."""
    # what is too long loses its beginning: the end is what is measured. One more than the model was trained on, since the last
    # token is predicted only, never read
    room = model.trained_len + 1
    documents = [(ids[-room:], mask[-room:]) for ids, mask in documents]
    with env.autocast():
        return answer_logps(model, model.head_weight, *pad(documents, pad_id, env.device))


def note_cut(n_tokens, model):
    """Say how many of the texts of so many tokens lose their beginning in logps_of()."""
    n_cut = sum(n > model.trained_len + 1 for n in n_tokens)
    if n_cut:
        print(f"note: {n_cut:,} of {len(n_tokens):,} texts are longer than the {model.trained_len} tokens that the "
              "model was trained on, and lose their beginning", file=sys.stderr)


# ---------------------------------------------------------------------------- minimal pairs


def read_pairs(path):
    """Return (good sentences, bad sentences) of a .jsonl file."""
    good = []
    bad = []
    for number, record in enumerate(records_of(path), 1):
        known = isinstance(record, dict) and {"sentence_good", "sentence_bad"} <= record.keys()
        check(known, f"{path}, record {number}: no sentence_good or no sentence_bad")
        for name, sentences in (("sentence_good", good), ("sentence_bad", bad)):
            text = record[name]
            check(isinstance(text, str) and text, f"{path}, record {number}: {name} is {text!r}, wanted a text")
            sentences.append(text)
    return good, bad


def minimal_pairs(model, tokenizer, cfg, env):
    """Which of two sentences is likelier; over all files, and for each file of a folder."""
    files = [cfg.input]
    if os.path.isdir(cfg.input):
        files = sorted(glob.glob(os.path.join(cfg.input, "*.jsonl")))
        check(files, f"no .jsonl file in '{cfg.input}'")
    everything = []
    equal_length = []
    each = {}
    n_tokens = []
    opening = tokenizer.start_ids or [tokenizer.eot_id]
    for path in files:
        good, bad = read_pairs(path)
        documents = []
        for sentence in good + bad:
            # after what begins every document, so that the first word counts, too
            ids = tokenizer.encode(sentence)
            mask = [0] * len(opening) + [1] * len(ids)
            documents.append((opening + ids, mask))
            n_tokens.append(len(mask))
        logps, lengths = logps_of(model, documents, tokenizer.pad_id, env)             # (2n), (2n)
        # log p falls with every token, log p / tokens makes long sentences look good; the root stands between
        scores = logps / lengths ** 0.5
        n = len(good)
        hits = scores[:n] > scores[n:] + 1e-6  # beyond rounding: a tie is a miss, and so is NaN
        everything += hits.tolist()
        equal_length += hits[lengths[:n] == lengths[n:]].tolist()
        name = os.path.basename(path).removesuffix(".jsonl")
        each[name] = hits.tolist()
    note_cut(n_tokens, model)
    result = {"all pairs (chance 50%)": everything, "pairs of equal length": equal_length}
    if len(files) > 1:
        result.update(each)
    return result


# ---------------------------------------------------------------------------- exams


@dataclass
class Exam:
    intro: str        # what stands before everything; {subject} is the subject's name
    dev: str          # file of examples
    held_out: str     # file of questions
    subjects: dict


# name of the files: name in the sentence before the questions
CEVAL = {
    "accountant": "注册会计师",
    "advanced_mathematics": "高等数学",
    "art_studies": "艺术学",
    "basic_medicine": "基础医学",
    "business_administration": "工商管理",
    "chinese_language_and_literature": "中国语言文学",
    "civil_servant": "公务员",
    "clinical_medicine": "临床医学",
    "college_chemistry": "大学化学",
    "college_economics": "大学经济学",
    "college_physics": "大学物理",
    "college_programming": "大学编程",
    "computer_architecture": "计算机组成",
    "computer_network": "计算机网络",
    "discrete_mathematics": "离散数学",
    "education_science": "教育学",
    "electrical_engineer": "注册电气工程师",
    "environmental_impact_assessment_engineer": "环境影响评价工程师",
    "fire_engineer": "注册消防工程师",
    "high_school_biology": "高中生物",
    "high_school_chemistry": "高中化学",
    "high_school_chinese": "高中语文",
    "high_school_geography": "高中地理",
    "high_school_history": "高中历史",
    "high_school_mathematics": "高中数学",
    "high_school_physics": "高中物理",
    "high_school_politics": "高中政治",
    "ideological_and_moral_cultivation": "思想道德修养与法律基础",
    "law": "法学",
    "legal_professional": "法律职业资格",
    "logic": "逻辑学",
    "mao_zedong_thought": "毛泽东思想和中国特色社会主义理论体系概论",
    "marxism": "马克思主义基本原理",
    "metrology_engineer": "注册计量师",
    "middle_school_biology": "初中生物",
    "middle_school_chemistry": "初中化学",
    "middle_school_geography": "初中地理",
    "middle_school_history": "初中历史",
    "middle_school_mathematics": "初中数学",
    "middle_school_physics": "初中物理",
    "middle_school_politics": "初中政治",
    "modern_chinese_history": "近代史纲要",
    "operating_system": "操作系统",
    "physician": "医师资格",
    "plant_protection": "植物保护",
    "probability_and_statistics": "概率统计",
    "professional_tour_guide": "导游资格",
    "sports_science": "体育学",
    "tax_accountant": "税务师",
    "teacher_qualification": "教师资格",
    "urban_and_rural_planner": "注册城乡规划师",
    "veterinary_medicine": "兽医学",
}
CMMLU = {
    "agronomy": "农学",
    "anatomy": "解剖学",
    "ancient_chinese": "古汉语",
    "arts": "艺术学",
    "astronomy": "天文学",
    "business_ethics": "商业伦理",
    "chinese_civil_service_exam": "中国公务员考试",
    "chinese_driving_rule": "中国驾驶规则",
    "chinese_food_culture": "中国饮食文化",
    "chinese_foreign_policy": "中国外交政策",
    "chinese_history": "中国历史",
    "chinese_literature": "中国文学",
    "chinese_teacher_qualification": "中国教师资格",
    "clinical_knowledge": "临床知识",
    "college_actuarial_science": "大学精算学",
    "college_education": "大学教育学",
    "college_engineering_hydrology": "大学工程水文学",
    "college_law": "大学法律",
    "college_mathematics": "大学数学",
    "college_medical_statistics": "大学医学统计",
    "college_medicine": "大学医学",
    "computer_science": "计算机科学",
    "computer_security": "计算机安全",
    "conceptual_physics": "概念物理学",
    "construction_project_management": "建设工程管理",
    "economics": "经济学",
    "education": "教育学",
    "electrical_engineering": "电气工程",
    "elementary_chinese": "小学语文",
    "elementary_commonsense": "小学常识",
    "elementary_information_and_technology": "小学信息技术",
    "elementary_mathematics": "初等数学",
    "ethnology": "民族学",
    "food_science": "食品科学",
    "genetics": "遗传学",
    "global_facts": "全球事实",
    "high_school_biology": "高中生物",
    "high_school_chemistry": "高中化学",
    "high_school_geography": "高中地理",
    "high_school_mathematics": "高中数学",
    "high_school_physics": "高中物理学",
    "high_school_politics": "高中政治",
    "human_sexuality": "人类性行为",
    "international_law": "国际法学",
    "journalism": "新闻学",
    "jurisprudence": "法理学",
    "legal_and_moral_basis": "法律与道德基础",
    "logical": "逻辑学",
    "machine_learning": "机器学习",
    "management": "管理学",
    "marketing": "市场营销",
    "marxist_theory": "马克思主义理论",
    "modern_chinese": "现代汉语",
    "nutrition": "营养学",
    "philosophy": "哲学",
    "professional_accounting": "专业会计",
    "professional_law": "专业法学",
    "professional_medicine": "专业医学",
    "professional_psychology": "专业心理学",
    "public_relations": "公共关系",
    "security_study": "安全研究",
    "sociology": "社会学",
    "sports_science": "体育学",
    "traditional_chinese_medicine": "中医中药",
    "virology": "病毒学",
    "world_history": "世界历史",
    "world_religions": "世界宗教",
}
EXAMS = {
    "ceval": Exam("以下是中国关于{subject}的单项选择题，请选出其中的正确答案。\n\n",
                  "dev/{file}_dev.csv", "val/{file}_val.csv", CEVAL),
    "cmmlu": Exam("以下是关于{subject}的单项选择题，请直接给出正确答案的选项。\n\n",
                  "dev/{file}.csv", "test/{file}.csv", CMMLU),
}


@dataclass
class Question:
    text: str         # all that stands before the answer's letter and its space
    right: int        # 0: A, …, 3: D


def read_rows(path):
    """Return the rows of a csv file, {question, a, b, c, d, answer}; CMMLU writes Question and Answer."""
    rows = []
    for row in records_of(path):
        row = {name.lower(): value for name, value in row.items()}
        missing = {"question", "a", "b", "c", "d"} - row.keys()
        check(not missing, f"{path} has no column {', '.join(sorted(missing))}")
        check(row.get("answer") in tuple(LETTERS), f"{path}: a question whose answer is {row.get('answer')!r}, "
              "wanted A, B, C or D")
        rows.append(row)
    return rows


def ask(row):
    """The text that the letter of the answer follows, after a space."""
    choices = "".join(f"{letter}. {row[letter.lower()]}\n" for letter in LETTERS)
    return f"{row['question'].strip()}\n{choices}答案："


def questions(name, folder, shots):
    """Return {subject: [Question]} of the subjects whose files are in the folder."""
    form = EXAMS[name]
    found = {}
    for file, subject in form.subjects.items():
        path = os.path.join(folder, form.held_out.format(file=file))
        if not os.path.exists(path):
            continue
        head = form.intro.format(subject=subject)
        if shots:
            examples = read_rows(os.path.join(folder, form.dev.format(file=file)))
            check(len(examples) >= shots, f"shots={shots}, but {file} has {len(examples)} examples")
            for row in examples[:shots]:
                head += f"{ask(row)} {row['answer']}\n\n"
        found[file] = []
        for row in read_rows(path):
            found[file].append(Question(head + ask(row), LETTERS.index(row["answer"])))
    check(found, f"no questions of {name} in '{folder}': wanted files like {form.held_out.format(file=file)}")
    return found


def exam(model, tokenizer, cfg, env):
    """The likeliest of the letters A to D after each question; over all subjects, and for each."""
    everything = []
    each = {}
    n_tokens = []
    subjects = questions(cfg.what, cfg.input, cfg.shots)
    for subject, asked in tqdm(subjects.items(), unit="subject", disable=None):
        documents = []
        for question in asked:
            n_text = len(tokenizer.encode(question.text))
            for letter in LETTERS:
                # encoded as a whole, as lm-eval does; what the model cannot see of it is cut off at the beginning
                ids = tokenizer.encode(f"{question.text} {letter}")
                mask = [0] * n_text + [1] * (len(ids) - n_text)
                documents.append((ids, mask))
                n_tokens.append(len(ids))
        logps, _ = logps_of(model, documents, tokenizer.pad_id, env)
        chosen = logps.view(-1, len(LETTERS)).argmax(dim=1)                        # (questions)
        right = torch.tensor([question.right for question in asked], device=env.device)
        each[subject] = (chosen == right).tolist()
        everything += each[subject]
    note_cut(n_tokens, model)
    return {f"{cfg.what}, {cfg.shots} shots (chance 25%)": everything, **each}
